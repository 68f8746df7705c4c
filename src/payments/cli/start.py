"""What most commands begin with: the settings, the logs, and a connection."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from payments.cli.exits import logs_are_set_up
from payments.observability.logs import set_up_logs
from payments.setting_sources import read_settings
from payments.settings import Settings

if TYPE_CHECKING:
    from payments.database.connections import Database, DatabaseAddress

T = TypeVar("T")


def begin(*, told: bool = False) -> Settings:
    """Reads the settings and sets up the logs; StartError.

    Unless `told`, the log tells no more than what is wrong: what a command does it prints itself.
    """
    settings = read_settings(os.environ)
    quiet = settings.log_level == "INFO" and not told
    set_up_logs(settings.log_format, "WARNING" if quiet else settings.log_level)  # type: ignore[arg-type]
    logs_are_set_up()
    return settings


def with_database(address: "DatabaseAddress", use: "Callable[[Database], Awaitable[T]]") -> T:
    """What a coroutine makes of the database, on one connection of a pool."""
    from payments.database.connections import Database

    async def run() -> T:
        database = Database(address, 1)
        await database.open()
        try:
            return await use(database)
        finally:
            await database.close()

    return asyncio.run(run())
