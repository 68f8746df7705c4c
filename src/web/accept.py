"""Content negotiation: which of several media types a client prefers (RFC 9110 section 12.5.1)."""

import re
from typing import NamedTuple

_QUALITY = re.compile(r"q=([01](?:\.[0-9]{0,3})?)", re.IGNORECASE)


class _Range(NamedTuple):
    """A media range of an Accept header. Parameters other than q are ignored."""

    type: str
    subtype: str
    quality: float

    def closeness(self, media_type: str) -> int | None:
        """How specifically the range matches the media type, None if it does not."""
        type_, _, subtype = media_type.partition("/")
        if (self.type, self.subtype) == ("*", "*"):
            return 0
        if self.type != type_ or self.subtype not in ("*", subtype):
            return None
        return 1 if self.subtype == "*" else 2


def preferred(accept: str, offered: tuple[str, ...]) -> str | None:
    """The offered media type with the highest q, None if none is acceptable (q=0 excludes one).
    Among equals an exact name wins, then the earlier in Accept, then the earlier offered."""
    ranges = [_range(part) for part in accept.split(",") if part.strip()]
    if not ranges:
        return offered[0]
    best, best_rank = None, (0.0, 0, 0)
    for media_type in offered:
        found = [
            (closeness, -place, range_.quality)
            for place, range_ in enumerate(ranges)
            if (closeness := range_.closeness(media_type)) is not None
        ]
        if found:
            closeness, place, quality = max(found)
            rank = (quality, closeness, place)
            if quality > 0 and (best is None or rank > best_rank):
                best, best_rank = media_type, rank
    return best


def _range(part: str) -> _Range:
    media_range, *parameters = (each.strip() for each in part.split(";"))
    type_, _, subtype = media_range.lower().partition("/")
    quality = 1.0
    for parameter in parameters:
        if match := _QUALITY.fullmatch(parameter):
            quality = min(1.0, float(match[1]))
    return _Range(type=type_, subtype=subtype, quality=quality)
