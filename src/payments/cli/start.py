"""The beginning of most commands: the settings, the logs, and a connection."""

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
    """Reads the settings and sets up the logs; raises StartError.

    Unless `told`, INFO lines are not logged: commands print their results themselves.
    """
    settings = read_settings(os.environ)
    quiet = settings.log_level == "INFO" and not told
    set_up_logs(settings.log_format, "WARNING" if quiet else settings.log_level)  # type: ignore[arg-type]
    logs_are_set_up()
    return settings


def with_database(address: "DatabaseAddress", use: "Callable[[Database], Awaitable[T]]") -> T:
    """The result of `use`, with a pool of one connection."""
    from payments.database.connections import Database

    async def run() -> T:
        async with Database(address, 1) as database:
            return await use(database)

    return asyncio.run(run())
