"""How commands end: one line on stderr states the error, the exit code its kind.

0 success, 1 failure, 2 wrong arguments, or output that cannot be written. For commands where 1
means findings, other failures are 2 too, so that a scheduled job can distinguish an alteration from
a full disk.

A command is imported when it is called; modules for error handling are imported when there is an
error.
"""

import importlib
import io
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn, TextIO

import click

from payments.cli.output import one_line
from payments.errors import PaymentsError, StartError

FINDINGS, FAILED, COULD_NOT_CHECK, COULD_NOT_WRITE = 1, 1, 2, 2
_CHECKS, _LOGS = "payments.cli.checks", "payments.cli.logs"


class OutputError(Exception):
    """The output of a command cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written: {error.strerror or error}")


def one_is_a_finding() -> None:
    """A checking command calls this first: then any error that ends it is exit code 2."""
    click.get_current_context().meta[_CHECKS] = True


def logs_are_set_up() -> None:
    """Marks that log lines may be written from now on."""
    click.get_current_context().meta[_LOGS] = True


class Commands(click.Group):
    """Turns errors into one line and an exit code.

    `commands_at`: by name, each command's module:attribute and the first sentence of its help.
    """

    def __init__(
        self, *args: Any, commands_at: Mapping[str, tuple[str, str]], **extra: Any
    ) -> None:
        super().__init__(*args, **extra)
        self._commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._commands_at:
            return None
        module, _, attribute = self._commands_at[cmd_name][0].partition(":")
        command: click.Command = getattr(
            importlib.import_module(f"payments.cli.{module}"), attribute
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self._commands_at[name][1]) for name in self.list_commands(ctx)]
            )

    def __call__(self, *args: Any, **extra: Any) -> Any:
        _set_up_streams()
        try:
            return super().__call__(*args, **extra)
        except OutputError as error:  # --help and --version print before a command is invoked
            discard(sys.stdout)
            _end(str(error), COULD_NOT_WRITE)

    def invoke(self, ctx: click.Context) -> object:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # here, where an error can still be reported
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            checks = ctx.meta.get(_CHECKS, False)
            reason = _reason(error, checks)
            if reason is None:
                raise
            code = COULD_NOT_CHECK if checks else FAILED
            if isinstance(error, OutputError):
                discard(sys.stdout)
                code = COULD_NOT_WRITE
            if ctx.meta.get(_LOGS):
                _log_where(error)
        return _end(f"could not check: {reason}" if checks else reason, code)


def _end(reason: str, code: int) -> NoReturn:
    click.echo(f"payments: {one_line(reason)}", err=True)
    sys.exit(code)


def _log_where(error: BaseException) -> None:
    from loguru import logger

    logger.opt(exception=error).debug("why the command ends")


def _reason(error: BaseException, checks: bool) -> str | None:
    """The error as text for people. None for a bug, which keeps its traceback, or Ctrl-C; but with
    `checks` they have a text too, since exit code 1 would mean a finding."""
    if isinstance(error, StartError | PaymentsError | OutputError):
        return str(error)
    if "psycopg" in sys.modules and (reason := _reason_of_database(error, checks)) is not None:
        return reason
    if not checks:
        return None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _reason_of_database(error: BaseException, checks: bool) -> str | None:
    import psycopg

    from payments.database.connections import reason_of

    if not isinstance(error, psycopg.Error):
        return None
    match error:
        case psycopg.OperationalError():  # a lock that is held, a server that is gone
            return f"the database: {reason_of(error)}: retry later"
        case psycopg.errors.ReadOnlySqlTransaction():
            return "the database refuses writes: it is a standby, or read-only"
        # The query is for another schema: see docs/decisions/upgrades.md.
        case (
            psycopg.errors.UndefinedTable()
            | psycopg.errors.UndefinedColumn()
            | psycopg.errors.UndefinedFunction()
        ):
            return (
                f"the database: {reason_of(error)}: does the schema match this version? "
                "`payments doctor`"
            )
        case psycopg.errors.InsufficientPrivilege():
            return f"the database: {reason_of(error)}"
    return f"the database: {reason_of(error)}" if checks else None


class _Stdout(io.BufferedWriter):
    """Raises OutputError for errors of stdout.

    Buffered: with a raw stream, Ctrl-C between a write and its bookkeeping would write twice.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error) from None


class _SilentStderr(io.BufferedWriter):
    """Ignores errors of stderr: a message that cannot be written is not a failure."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _set_up_streams() -> None:
    """Replaces the streams: Python omits closed ones (environment.py has opened a substitute), and
    uses the encoding of the locale or PYTHONIOENCODING, which may lack most of Unicode."""
    out = io.FileIO(1, "w", closefd=False)
    sys.stdout = _text(_Stdout(out), sys.stdout, by_line=out.isatty())
    sys.stderr = _text(_SilentStderr(io.FileIO(2, "w", closefd=False)), sys.stderr, by_line=True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")


def _text(buffer: io.BufferedWriter, before: TextIO | None, *, by_line: bool) -> io.TextIOWrapper:
    """UTF-8 for programs, as JSON requires; for terminals their own encoding, with escapes."""
    encoding = before.encoding if before is not None and buffer.isatty() else "utf-8"
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", None, by_line)


def discard(stream: TextIO) -> None:
    """Redirects the stream to /dev/null. Else Python would retry the write at exit, and end with
    exit code 120."""
    with suppress(OSError):  # the stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
