"""Reads what Order Service's responses say of an order: those to callbacks, and those of its status
URL.

Pure, and the only code that reads them. Both are a JSON object with `order_status` or `status`, at
the top level or within `order` or `data`. A word in neither list below means unknown: money is
given back for explicit words only.
"""

from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

CONFIRMED = frozenset({"CONFIRMED", "COMPLETED", "FULFILLED"})
FAILED = frozenset({"FAILED", "CANCELLED", "CANCELED", "EXPIRED", "REJECTED"})
ALREADY = "already processed"
WORD_MAX = 64  # characters of a response's word that are kept

Said = Literal["confirmed", "failed", "already_processed", "nothing"]
Verdict = Literal["confirmed", "failed", "unknown"]


class Reading(NamedTuple):
    """The result of a status response. `order_status` is Order Service's word, printable and at
    most WORD_MAX characters; if it is None, `problem` says why."""

    verdict: Verdict
    order_status: str | None
    problem: str | None


def said_of(body: bytes, order_id: UUID) -> Said:
    """What the 2xx response to a SUCCESS says of its order. `body` may be truncated."""
    places = _places(body)
    if _names_another(places, None, order_id):
        return "nothing"
    verdict, _, _ = _status_in(places)
    if verdict != "unknown":
        return verdict
    notes = [place.get(name) for place in places for name in ("note", "message")]
    told = any(isinstance(note, str) and ALREADY in note.lower() for note in notes)
    return "already_processed" if told else "nothing"


def read_status(status: int, content_type: str | None, body: bytes, order_id: UUID) -> Reading:
    """What the response of ORDER_STATUS_URL says of the order `order_id`."""
    if status != 200:
        return not_known(str(status))
    if not is_json(content_type):
        return not_known("not JSON")
    places = _places(body)
    if not places:
        return not_known("no JSON object")
    verdict, word, place = _status_in(places)
    if _names_another(places, place, order_id):
        return not_known("another order")
    if word is None:
        return not_known("no status")
    return Reading(verdict=verdict, order_status=bounded(word), problem=None)


def not_known(problem: str) -> Reading:
    return Reading(verdict="unknown", order_status=None, problem=bounded(problem))


def bounded(text: str) -> str:
    """The text on one line, with unprintable characters escaped, cut to WORD_MAX."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[:WORD_MAX]
    )
    return shown[:WORD_MAX]


def is_json(content_type: str | None) -> bool:
    """application/json, application/problem+json and the like."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    return media_type.endswith(("/json", "+json"))


def _places(body: bytes) -> list[dict[str, Any]]:
    """The objects that may contain a status, the most specific first; empty if the body is not a
    JSON object."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    within = [content.get(name) for name in ("order", "data")]
    return [*(place for place in within if isinstance(place, dict)), content]


def _status_in(
    places: list[dict[str, Any]],
) -> tuple[Verdict, str | None, dict[str, Any] | None]:
    """The verdict, the word and the object that contains it. An envelope may have its own status:
    the most specific object counts, unless another one contradicts it."""
    found = [(word, place) for place in places if (word := _word_of(place)) is not None]
    if not found:
        return "unknown", None, None
    verdicts = [_verdict_on(word) for word, _ in found]
    contradict = {"confirmed", "failed"} <= set(verdicts)
    word, place = found[0]
    return "unknown" if contradict else verdicts[0], word, place


def _word_of(place: dict[str, Any]) -> str | None:
    for name in ("order_status", "status"):
        if name in place:
            word = place[name]
            return word if isinstance(word, str) else None
    return None


def _verdict_on(word: str) -> Verdict:
    # upper() turns some non-ASCII words into CONFIRMED.
    known = word.upper() if word.isascii() else ""
    return "confirmed" if known in CONFIRMED else "failed" if known in FAILED else "unknown"


def _names_another(
    places: list[dict[str, Any]], told_by: dict[str, Any] | None, order_id: UUID
) -> bool:
    """Whether the response is about another order. `order_id` counts in every object, `id` only
    beside the order's status."""
    named = [place["order_id"] for place in places if "order_id" in place]
    if told_by is not None and "order_id" not in told_by and "id" in told_by:
        named.append(told_by["id"])
    return any(not isinstance(name, str) or name.lower() != str(order_id) for name in named)
