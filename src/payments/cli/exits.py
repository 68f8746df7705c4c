"""How commands end: one line on stderr says what went wrong, and the exit code what kind it was.

0 done, 1 could not, 2 wrong arguments. Where 1 means that something was found, whatever else goes
wrong is 2 as well: a night job must be able to tell an alteration from a full disk.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn, TextIO

import click
import psycopg
from loguru import logger

from payments.cli.output import one_line
from payments.database import reason_of
from payments.errors import PaymentsError, StartError

FINDINGS, FAILED, COULD_NOT_CHECK = 1, 1, 2
_CHECKS = "payments.cli.exits"

# What a query says that was written for another schema: see docs/decisions/upgrades.md.
_OTHER_SCHEMA = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
)


class OutputError(OSError):
    """What a command prints cannot be written."""

    def __str__(self) -> str:
        return f"the output cannot be written: {self.strerror}"


def one_is_a_finding() -> None:
    """To be said first by a command that checks: whatever makes it end early is exit code 2."""
    click.get_current_context().meta[_CHECKS] = True


class Commands(click.Group):
    """Turns what goes wrong into one line and an exit code."""

    def __call__(self, *args: Any, **extra: Any) -> Any:
        _set_up_streams()
        logger.remove()  # until `begin` has read the settings, nobody has said where to log
        try:
            return super().__call__(*args, **extra)
        except OutputError as error:  # --help and --version are printed before a command is invoked
            discard(sys.stdout)
            _end(str(error), FAILED)

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
            if isinstance(error, OSError):
                discard(sys.stdout)
            logger.opt(exception=error).debug("why the command ends")
        return _end(
            f"could not check: {reason}" if checks else reason,
            COULD_NOT_CHECK if checks else FAILED,
        )


def _end(reason: str, code: int) -> NoReturn:
    click.echo(f"payments: {one_line(reason)}", err=True)
    sys.exit(code)


def _reason(error: BaseException, checks: bool) -> str | None:
    """What went wrong, for people. None: a defect, for whoever develops this; Ctrl-C; or a pipe
    whose reader has seen enough. They are told only where exit code 1 would pass for a finding."""
    reason: str | None = None
    match error:
        case StartError() | PaymentsError():
            reason = str(error)
        case psycopg.OperationalError():  # a lock that is held, a server that is gone
            reason = f"the database: {reason_of(error)}: try again later"
        case psycopg.errors.ReadOnlySqlTransaction():
            reason = "the database refuses to write: it is a standby, or read-only"
        case psycopg.errors.InsufficientPrivilege():
            reason = f"the database: {reason_of(error)}"
        case psycopg.Error() if isinstance(error, _OTHER_SCHEMA):
            reason = f"the database: {reason_of(error)}: does its schema fit? `payments doctor`"
        case psycopg.Error() if checks:
            reason = f"the database: {reason_of(error)}"
        case KeyboardInterrupt() if checks:
            reason = "interrupted"
        case OutputError():
            reason = str(error)
        case BrokenPipeError() if checks:
            reason = str(OutputError(error.errno, error.strerror))
        case Exception() if checks:
            reason = f"{type(error).__name__}: {error}"
    return reason


class _Stdout(io.BufferedWriter):
    """Says of an error that it was the output's. What nobody reads on is left as it is.

    Not a raw stream: Ctrl-C between its write and the buffer's note of it would write twice.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _output_error(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _output_error(error) from None


class _Stderr(io.BufferedWriter):
    """That somebody cannot be told is no reason to fail."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _output_error(error: OSError) -> OSError:
    if isinstance(error, BrokenPipeError):
        return error
    return OutputError(error.errno, error.strerror)


def _set_up_streams() -> None:
    """Python leaves out what is closed: the output would vanish without an error, and the next file
    or connection would get its descriptor."""
    out, err = sys.stdout, sys.stderr
    if out is None:
        sys.stdout = io.TextIOWrapper(_Stdout(_devnull(os.O_RDONLY)), "utf-8")
    else:
        raw = io.FileIO(out.fileno(), "w", closefd=False)
        by_line = raw.isatty()
        sys.stdout = io.TextIOWrapper(_Stdout(raw), out.encoding, out.errors, None, by_line)
    if err is None:
        sys.stderr = io.TextIOWrapper(_Stderr(_devnull(os.O_WRONLY)), "utf-8", None, None, True)
    else:
        raw = io.FileIO(err.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(_Stderr(raw), err.encoding, err.errors, None, True)


def _devnull(flags: int) -> io.FileIO:
    return io.FileIO(os.open(os.devnull, flags), "w")


def discard(stream: TextIO) -> None:
    """What could not be written is not tried again at the end of the process, whose exit code
    would then be 120."""
    with suppress(OSError):  # it has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
