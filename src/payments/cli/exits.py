"""How commands end: one line on stderr says what went wrong, and the exit code what kind it was.

0 done, 1 could not, 2 wrong arguments, or output that cannot be written. Where 1 means that
something was found, whatever else goes wrong is 2 as well: a night job must be able to tell an
alteration from a full disk.

A command is imported when it is called, and what only a failure needs when there is one.
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
    """What a command prints cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written: {error.strerror or error}")


def one_is_a_finding() -> None:
    """To be said first by a command that checks: whatever makes it end early is exit code 2."""
    click.get_current_context().meta[_CHECKS] = True


def logs_are_set_up() -> None:
    """Until then nobody has said where to log."""
    click.get_current_context().meta[_LOGS] = True


class Commands(click.Group):
    """Turns what goes wrong into one line and an exit code.

    `commands_at`: of each command's name its place, module:attribute, and the first sentence of its
    help.
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
        except OutputError as error:  # --help and --version are printed before a command is invoked
            discard(sys.stdout)
            _end(str(error), COULD_NOT_WRITE)

    def invoke(self, ctx: click.Context) -> object:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # as long as its failure can be told
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
    """What went wrong, for people. None: a defect, for whoever develops this, or Ctrl-C. They are
    told only where exit code 1 would pass for a finding."""
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
            return f"the database: {reason_of(error)}: try again later"
        case psycopg.errors.ReadOnlySqlTransaction():
            return "the database refuses to write: it is a standby, or read-only"
        # A query that was written for another schema: see docs/decisions/upgrades.md.
        case (
            psycopg.errors.UndefinedTable()
            | psycopg.errors.UndefinedColumn()
            | psycopg.errors.UndefinedFunction()
        ):
            return f"the database: {reason_of(error)}: does its schema fit? `payments doctor`"
        case psycopg.errors.InsufficientPrivilege():
            return f"the database: {reason_of(error)}"
    return f"the database: {reason_of(error)}" if checks else None


class _Stdout(io.BufferedWriter):
    """Says of an error that it was the output's.

    Not a raw stream: Ctrl-C between its write and the buffer's note of it would write twice.
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
    """That somebody cannot be told is no reason to fail."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _set_up_streams() -> None:
    """Python leaves out what is closed (environment.py has put something in its place), and writes
    in the encoding of the locale, or of PYTHONIOENCODING, in which most of Unicode may be missing.
    """
    out = io.FileIO(1, "w", closefd=False)
    sys.stdout = _text(_Stdout(out), sys.stdout, by_line=out.isatty())
    sys.stderr = _text(_SilentStderr(io.FileIO(2, "w", closefd=False)), sys.stderr, by_line=True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")


def _text(buffer: io.BufferedWriter, before: TextIO | None, *, by_line: bool) -> io.TextIOWrapper:
    """Programs get UTF-8, as JSON has to be; terminals what they show, the rest as escapes."""
    encoding = before.encoding if before is not None and buffer.isatty() else "utf-8"
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", None, by_line)


def discard(stream: TextIO) -> None:
    """What could not be written is not tried again at the end of the process, whose exit code
    would then be 120."""
    with suppress(OSError):  # it has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
