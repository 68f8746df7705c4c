"""The hash chain over the log, and an event's form in an export: what an audit goes by.

Pure. The seal of the event at position n is

    SHA-256( seal of position n-1  +  canonical bytes of the event at position n )

with 32 zero bytes for the seal of position 0. The canonical bytes are, integers big-endian and
signed:

    position     8 bytes
    payment_id  16 bytes
    version      8 bytes
    recorded_at  8 bytes: microseconds since 1970-01-01T00:00:00Z
    type         4 bytes: how many bytes follow; then these, UTF-8
    data         the stored bytes, to the end
"""

import base64
import struct
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import UUID

import msgspec

from payments.events.store import LogEntry

GENESIS = bytes(32)
_HEAD = struct.Struct(">q16sqqi")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_encoder = msgspec.json.Encoder()
_text = msgspec.json.Decoder(msgspec.Raw)  # only looks whether it is JSON


def seal(previous: bytes, entry: LogEntry) -> bytes:
    """The seal of an event, 32 bytes, after the seal of the event before it."""
    position, payment_id, version, topic, state, recorded_at = entry
    micros = (recorded_at - _EPOCH) // _MICROSECOND
    kind = topic.encode()
    head = _HEAD.pack(position, payment_id.bytes, version, micros, len(kind))
    return sha256(b"".join((previous, head, kind, state))).digest()


class ExportLine(msgspec.Struct, frozen=True, kw_only=True):
    """An event as a line of JSON. `data` are the stored bytes themselves, one JSON text.

    Where they are none, or hold a line break, `data` is null and `state_base64` has them. `hash`
    is the event's seal in hexadecimal; null: it was not sealed yet.
    """

    position: int
    payment_id: UUID
    version: int
    type: str
    recorded_at: datetime
    data: msgspec.Raw
    state_base64: str | msgspec.UnsetType = msgspec.UNSET
    hash: str | None = None

    @property
    def entry(self) -> LogEntry:
        """Raises ValueError if the time has no offset, or the base64 text is none."""
        if self.recorded_at.tzinfo is None:
            raise ValueError("recorded_at has no offset from UTC")
        if isinstance(self.state_base64, str):
            state = base64.b64decode(self.state_base64, validate=True)
        else:
            state = bytes(self.data)
        return LogEntry(
            position=self.position,
            payment_id=self.payment_id,
            version=self.version,
            topic=self.type,
            state=state,
            recorded_at=self.recorded_at,
        )


_decoder = msgspec.json.Decoder(ExportLine)


def write_line(entry: LogEntry, hash: bytes | None) -> bytes:
    """The event as a line of an export, without the line break."""
    fits = _is_one_line_of_json(entry.state)
    line = ExportLine(
        position=entry.position,
        payment_id=entry.payment_id,
        version=entry.version,
        type=entry.topic,
        recorded_at=entry.recorded_at,
        data=msgspec.Raw(entry.state if fits else b"null"),
        state_base64=msgspec.UNSET if fits else base64.b64encode(entry.state).decode(),
        hash=None if hash is None else hash.hex(),
    )
    return _encoder.encode(line)


def read_line(line: bytes) -> ExportLine:
    """Raises ValueError (msgspec's own errors are such) for what is not a line of an export."""
    return _decoder.decode(line)


def _is_one_line_of_json(state: bytes) -> bool:
    # Around the text JSON allows blanks, which a reader would take for its own.
    if b"\n" in state or b"\r" in state or state != state.strip():
        return False
    try:
        _text.decode(state)
        state.decode()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return False
    return True
