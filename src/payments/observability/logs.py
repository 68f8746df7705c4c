"""Logs: JSON lines on stderr, or readable lines on a terminal.

Fields name the request, trace, payment and order of a line: `with LogFields(payment_id=…)` adds a
field to all lines of a task. Text from outside is only ever the value of a field, never a message
with braces.

Logging never blocks on the reader of stderr: up to BUFFER_MAX bytes are buffered, then new lines
are dropped and counted.
"""

import asyncio
import atexit
import json
import logging
import math
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from loguru import logger

if TYPE_CHECKING:
    from loguru import Message, Record

BUFFER_MAX = 4 * 1024 * 1024  # bytes of buffered lines
PIPE_BUF = 4096  # bytes that a writable pipe accepts without blocking: pipe(7)
RETRY_S = 0.05
EXIT_S = 1.0  # for the last lines, at the end of the process
REPEAT_S = 60.0  # until a continuing failure is logged again

# Select graphic rendition: ECMA-48 section 8.3.117.
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

_json_stderr: "_Stderr | None" = None  # set if INFO lines are JSON
_encoder = msgspec.json.Encoder()
_NONE: Mapping[str, Any] = {}


def set_up_logs(format: Literal["auto", "json", "text"], level: str) -> None:
    """Sends all log lines, also those of libraries, to stderr."""
    global _json_stderr
    logger.remove()
    stderr = _Stderr()
    _json_stderr = None
    is_terminal = sys.stderr.isatty()
    # diagnose prints the values of variables into tracebacks, secrets among them.
    safe: dict[str, Any] = {"level": level, "diagnose": False, "backtrace": False}
    if format == "text" or (format == "auto" and is_terminal):
        logger.add(
            lambda message: stderr.write(_text_line(message, is_terminal)),
            format="{message}",
            **safe,
        )
    else:
        logger.add(lambda message: stderr.write(_json_line(message)), format="{message}", **safe)
        if logger.level(level).no <= logger.level("INFO").no:
            _json_stderr = stderr
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)


_fields: ContextVar[Mapping[str, Any]] = ContextVar("fields of log lines")


class LogFields:
    """Adds fields to all lines within a `with` block, also to those of tasks that begin there.

    loguru's contextualize does the same and takes four times as long; each charge has two blocks.
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._token: Token[Mapping[str, Any]] | None = None

    def __enter__(self) -> None:
        self._token = _fields.set({**_fields.get(_NONE), **self._fields})

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _fields.reset(self._token)


def _add_fields(record: "Record") -> None:
    record["extra"] = {**_fields.get(_NONE), **record["extra"]}


logger.configure(patcher=_add_fields)


class Repeats:
    """Logs a repeated failure when it is new, and then once in REPEAT_S with the number of
    suppressed repetitions, so that it does not hide other lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[object, tuple[float, int]] = {}  # time of the line, repetitions since

    def tell(
        self,
        level: Literal["WARNING", "ERROR", "CRITICAL"],
        message: str,
        *,
        of: str | type[BaseException] | None = None,
        exception: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """Logs the message, unless it was logged for the same `of` within REPEAT_S. `of` has few
        values; it is not an id."""
        unsaid = self.due((message, of))
        if unsaid is not None:
            fields |= unsaid
            logger.bind(**fields).opt(exception=exception).log(level, message)

    def due(self, what: object) -> dict[str, int] | None:
        """The extra fields of the line, None if it must not be logged now."""
        now = self._clock()
        told_at, unsaid = self._told.get(what, (-math.inf, 0))
        if now - told_at < REPEAT_S:
            self._told[what] = told_at, unsaid + 1
            return None
        self._told[what] = now, 0
        return {"unsaid": unsaid} if unsaid else {}


def trace_field(traceparent: str | None) -> dict[str, str]:
    """The field for LogFields: the trace id, or none."""
    return {} if traceparent is None else {"trace_id": traceparent[3:35]}


def log_money(message: str, traceparent: str | None, **fields: Any) -> None:
    """Logs at INFO that an outcome was recorded; as JSON with exactly these fields.

    There is one line for each charge, so JSON lines bypass loguru, which takes several times as
    long, and those of one turn of the event loop are written together.
    """
    fields |= trace_field(traceparent)
    if _json_stderr is None:
        logger.bind(**fields).info(message)
        return
    line = _line(datetime.now(UTC), "INFO", message) | fields
    _json_stderr.write_soon(_encoder.encode(line) + b"\n")


def _line(time: datetime, level: str, message: str) -> dict[str, Any]:
    return {"time": time.isoformat(timespec="milliseconds"), "level": level, "message": message}


def _json_line(message: "Message") -> bytes:
    record = message.record
    line = _line(record["time"].astimezone(UTC), record["level"].name, record["message"])
    line |= {name: value for name, value in record["extra"].items() if name not in line}
    if record["exception"] is not None:
        line["exception"] = _traceback(message)
    try:
        encoded = msgspec.json.encode(line, enc_hook=str)
    except UnicodeEncodeError:  # an unpaired surrogate, which must be escaped
        encoded = json.dumps(line, default=str).encode()
    return encoded + b"\n"


def _text_line(message: "Message", is_terminal: bool) -> bytes:
    record = message.record
    level = record["level"].name
    fields = " ".join(f"{name}={_shown(value)}" for name, value in record["extra"].items())
    said = record["message"] if record["message"].isprintable() else repr(record["message"])
    parts = [f"{record['time']:%H:%M:%S.%f}"[:-3], f"{level:<8}", said, fields]
    if is_terminal:
        parts[1] = f"{_COLOURS.get(level, '')}{parts[1]}{_PLAIN}"
        parts[3] = f"{_DIM}{fields}{_PLAIN}"
    line = " ".join(parts).rstrip() + "\n"
    if record["exception"] is not None:
        line += _traceback(message) + "\n"
    return line.encode(errors="backslashreplace")


def _shown(value: object) -> str:
    """A single word unchanged, other values quoted, so that they cannot imitate another field or
    line."""
    text = str(value)
    return text if re.fullmatch(r"[\w.:/+@-]+", text, re.ASCII) else repr(text)


def _traceback(message: "Message") -> str:
    return str(message).removeprefix(message.record["message"]).strip()


class _Stderr:
    """Writes lines, and never waits for their reader."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._dropped = 0
        self._is_retrying = False
        self._is_due = False  # `_flush_soon` is
        self._lock = threading.Lock()
        self._fd = _descriptor()
        if self._fd is not None:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)
            atexit.register(self._flush, EXIT_S)

    def write(self, line: bytes) -> None:
        if self._fd is None:
            sys.stderr.buffer.write(line)
            return
        self._add(line)
        self._flush()

    def write_soon(self, line: bytes) -> None:
        """Writes at the end of this turn of the event loop; without one at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if self._fd is None or loop is None:
            self.write(line)
            return
        self._add(line)
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._is_due = False
        self._flush()

    def _add(self, line: bytes) -> None:
        with self._lock:
            if len(self._waiting) + len(line) > BUFFER_MAX:
                self._dropped += 1
            else:
                self._waiting += line

    def _flush(self, timeout_s: float = 0.0) -> None:
        """Writes as much as possible; waits for the reader for at most `timeout_s`."""
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            while self._waiting:
                left_s = max(0.0, give_up_at - time.monotonic())
                if not self._poll.poll(left_s * 1000) or not self._write_some():
                    self._retry_later()
                    return

    def _write_some(self) -> bool:
        """False if another process has just filled the pipe."""
        assert self._fd is not None
        try:
            written = os.write(self._fd, self._waiting[:PIPE_BUF])
        except BlockingIOError:
            return False
        except OSError:  # the reader has closed the pipe, or the disk is full
            written = len(self._waiting)
        del self._waiting[:written]
        if self._dropped and not self._waiting:
            told = _line(
                datetime.now(UTC), "WARNING", "log lines were dropped: the log was not read"
            )
            self._waiting += _encoder.encode(told | {"lines": self._dropped}) + b"\n"
            self._dropped = 0
        return True

    def _retry_later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # retried with the next line, or at the end of the process
        if not self._is_retrying:
            self._is_retrying = True
            loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._is_retrying = False
        self._flush()


def _descriptor() -> int | None:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):  # replaced by a file-like object without a descriptor
        return None


class _ToLoguru(logging.Handler):
    """Passes the log lines of libraries that use `logging` to loguru."""

    def __init__(self) -> None:
        super().__init__()
        self._repeats = Repeats()

    def emit(self, record: logging.LogRecord) -> None:
        unsaid: dict[str, int] | None = {}
        if record.name.startswith("psycopg"):  # it logs each attempt to connect
            unsaid = self._repeats.due((record.name, record.msg))
        if unsaid is None:
            return
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        try:
            # As an argument: loguru would expand braces in the text.
            bound = logger.bind(logger=record.name, **unsaid).opt(exception=record.exc_info)
            bound.log(level, "{}", record.getMessage())
        except Exception:  # noqa: BLE001 - a library must not fail because of its logging
            self.handleError(record)
