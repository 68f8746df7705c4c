"""Cursors: the end of a list page as an opaque text."""

import base64
import struct
import zlib
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from payments.errors import FieldError, InvalidRequest

# Microseconds since 1970 and the payment's id, then a CRC-32 that includes the list's name. A
# cursor that is truncated, mistyped or of another list must be rejected: as another place in the
# list it would silently skip payments.
_PLACE = struct.Struct(">q16s")
_CHECKSUM = struct.Struct(">I")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class ListPlace(NamedTuple):
    """The last payment of a page, in the list's order: by time (of creation, if the list does not
    define another), then by id."""

    created_at: datetime
    id: UUID


def write_cursor(place: ListPlace, of: str = "") -> str:
    """`of` names the list; the list of all payments has no name."""
    packed = _PLACE.pack((place.created_at - _EPOCH) // _MICROSECOND, place.id.bytes)
    checked = packed + _CHECKSUM.pack(zlib.crc32(packed, zlib.crc32(of.encode())))
    return base64.urlsafe_b64encode(checked).rstrip(b"=").decode("ascii")


def read_cursor(cursor: str, of: str = "") -> ListPlace:
    """Raises InvalidRequest, which names `cursor`."""
    try:
        place = _unpack(base64.b64decode(_padded(cursor), altchars=b"-_", validate=True))
    except (ValueError, OverflowError, struct.error):
        place = None
    if place is None or write_cursor(place, of) != cursor:
        error = FieldError("cursor", "must be the next_cursor of an earlier response, unchanged")
        raise InvalidRequest("The cursor is not valid.", (error,))
    return place


def _padded(cursor: str) -> bytes:
    return cursor.encode("ascii") + b"=" * (-len(cursor) % 4)


def _unpack(checked: bytes) -> ListPlace:
    micros, id_bytes = _PLACE.unpack(checked[: _PLACE.size])
    return ListPlace(_EPOCH + micros * _MICROSECOND, UUID(bytes=id_bytes))
