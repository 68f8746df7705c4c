"""Opens the database of the settings: connects to it or starts it, checks it, and releases it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from loguru import logger

from payments import embedded_postgres
from payments.database.connections import (
    DatabaseAddress,
    create_database_if_missing,
    refuse_pooling,
)
from payments.embedded_postgres.keeper import Keeper
from payments.errors import StartError
from payments.migrations import check_migrated, check_readable, migrate
from payments.settings import Settings

Purpose = Literal["migrate", "run", "read", "look"]
_MAKE_SURE: dict[Purpose, Callable[[DatabaseAddress], object]] = {
    "migrate": migrate,
    "run": check_migrated,
    "read": check_readable,
    "look": lambda _: None,
}


def data_dir(settings: Settings) -> Path:
    try:
        return settings.payments_data_dir or embedded_postgres.default_data_dir()
    except RuntimeError:
        raise StartError("there is no home directory: set PAYMENTS_DATA_DIR") from None


def heads_dir(settings: Settings) -> Path | None:
    """The directory of the newest seal; None if there is no data directory."""
    try:
        return data_dir(settings)
    except StartError:
        return None


@contextmanager
def open_database(
    settings: Settings, *, to: Purpose, lasting: bool = False
) -> Iterator[DatabaseAddress]:
    """The database of the settings; the embedded one runs while the block does.

    `to` is the purpose: "migrate" brings the schema up to date, "run" checks that it is, and that
    this version may write to it, "read" also accepts a newer one, and "look" any or none.
    `lasting`: the embedded one is restarted whenever it ends; if that fails, this process receives
    a SIGTERM. Raises StartError, in that case at the end of the block.
    """
    make_sure = _MAKE_SURE[to]
    if settings.database_host is not None:
        address = DatabaseAddress.from_settings(settings)
        refuse_pooling(address)
        make_sure(address)
        yield address
        return
    try:
        server = embedded_postgres.start(data_dir(settings))
    except embedded_postgres.EmbeddedPostgresError as error:
        raise StartError(str(error)) from None
    with server:
        level = "INFO" if lasting else "DEBUG"  # commands print their own results
        logger.bind(socket=str(server.socket_dir)).log(level, "embedded Postgres is running")
        address = DatabaseAddress(
            host=str(server.socket_dir),
            port=server.port,
            user=server.user,
            password=None,
            dbname=settings.database_name,
        )
        create_database_if_missing(address)
        make_sure(address)
        if not lasting:
            yield address
            return
        with Keeper(server, lambda: os.kill(os.getpid(), signal.SIGTERM)) as keeper:
            try:
                yield address
            finally:
                if keeper.lost is not None:
                    raise StartError(keeper.lost)
