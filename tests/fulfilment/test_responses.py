"""What Order Service's responses mean: pure, one case a line."""

from typing import Any
from uuid import UUID

import msgspec
import pytest

from payments.order_service.responses import WORD_MAX, Reading, bounded, read_status, said_of

ORDER = UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
OTHER = str(UUID(int=1))
JSON = "application/json; charset=utf-8"


def encoded(content: Any) -> bytes:
    return content if isinstance(content, bytes) else msgspec.json.encode(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"order_id": str(ORDER), "status": "CONFIRMED"}, "confirmed"),
        ({"status": "completed"}, "confirmed"),
        ({"order": {"id": str(ORDER), "order_status": "Fulfilled"}}, "confirmed"),
        ({"status": "success", "data": {"status": "CONFIRMED"}}, "confirmed"),
        ({"order_id": str(ORDER).upper(), "status": "FAILED"}, "failed"),
        ({"data": {"status": "cancelled"}}, "failed"),
        ({"status": "Canceled"}, "failed"),
        ({"message": "already processed"}, "already_processed"),
        ({"ok": True, "note": "Already processed."}, "already_processed"),
        ({"data": {"note": "already processed"}}, "already_processed"),
        ({"note": 5, "message": ["already processed"]}, "nothing"),
        ({"ok": True}, "nothing"),
        ({"status": "PENDING"}, "nothing"),
        ({"status": "CONFIRMED", "order_id": OTHER}, "nothing"),
        ({"status": "CONFIRMED", "order": {"status": "FAILED"}}, "nothing"),
        (b'{"status":"CONFIRMED"', "nothing"),  # cut off
        (b"", "nothing"),
        (b"<html>CONFIRMED</html>", "nothing"),
        ([{"status": "CONFIRMED"}], "nothing"),
        (b"[" * 100_000, "nothing"),
        (b'{"status":"CONFIRMED\xff"}', "nothing"),
    ],
)
def test_what_the_response_to_a_callback_says(content: Any, said: str) -> None:
    assert said_of(encoded(content), ORDER) == said


OF_ORDER = {"order_id": str(ORDER)}


@pytest.mark.parametrize(
    ("content", "reading"),
    [
        (
            OF_ORDER | {"status": "CONFIRMED"},
            Reading(verdict="confirmed", order_status="CONFIRMED", problem=None),
        ),
        (
            {"status": "Fulfilled"},
            Reading(verdict="confirmed", order_status="Fulfilled", problem=None),
        ),
        (
            {"id": str(ORDER), "status": "failed"},
            Reading(verdict="failed", order_status="failed", problem=None),
        ),
        (
            OF_ORDER | {"status": "CANCELED"},
            Reading(verdict="failed", order_status="CANCELED", problem=None),
        ),
        (
            OF_ORDER | {"status": "CANCELLED"},
            Reading(verdict="failed", order_status="CANCELLED", problem=None),
        ),
        (
            OF_ORDER | {"status": "EXPIRED"},
            Reading(verdict="failed", order_status="EXPIRED", problem=None),
        ),
        (
            OF_ORDER | {"status": "REJECTED"},
            Reading(verdict="failed", order_status="REJECTED", problem=None),
        ),
        (
            {"order": OF_ORDER | {"status": "FAILED"}},
            Reading(verdict="failed", order_status="FAILED", problem=None),
        ),
        (
            {"id": "request 7", "status": "ok", "data": OF_ORDER | {"order_status": "FAILED"}},
            Reading(verdict="failed", order_status="FAILED", problem=None),
        ),
        # Whatever is in neither list is the order's own word, and tells nothing.
        (
            OF_ORDER | {"status": "PENDING"},
            Reading(verdict="unknown", order_status="PENDING", problem=None),
        ),
        (
            OF_ORDER | {"status": "REFUNDED"},
            Reading(verdict="unknown", order_status="REFUNDED", problem=None),
        ),
        (
            OF_ORDER | {"status": "PAYMENT_FAILED"},
            Reading(verdict="unknown", order_status="PAYMENT_FAILED", problem=None),
        ),
        (
            OF_ORDER | {"status": " FAILED"},
            Reading(verdict="unknown", order_status=" FAILED", problem=None),
        ),
        (
            OF_ORDER | {"status": "con\ufb01rmed"},
            Reading(verdict="unknown", order_status="con\ufb01rmed", problem=None),
        ),
        (
            {"order": OF_ORDER | {"status": "FAILED"}, "status": "CONFIRMED"},
            Reading(verdict="unknown", order_status="FAILED", problem=None),
        ),
        (
            {"status": "FAILED", "data": OF_ORDER | {"status": "SHIPPED"}},
            Reading(verdict="unknown", order_status="SHIPPED", problem=None),
        ),
        # Another order's, or of nobody knows what.
        (
            {"order_id": OTHER, "status": "FAILED"},
            Reading(verdict="unknown", order_status=None, problem="another order"),
        ),
        (
            {"id": OTHER, "status": "FAILED"},
            Reading(verdict="unknown", order_status=None, problem="another order"),
        ),
        (
            {"id": 7, "status": "FAILED"},
            Reading(verdict="unknown", order_status=None, problem="another order"),
        ),
        (
            {"order_id": OTHER, "order": OF_ORDER | {"status": "FAILED"}},
            Reading(verdict="unknown", order_status=None, problem="another order"),
        ),
        (
            OF_ORDER | {"status": None},
            Reading(verdict="unknown", order_status=None, problem="no status"),
        ),
        (
            OF_ORDER | {"order_status": 1, "status": "FAILED"},
            Reading(verdict="unknown", order_status=None, problem="no status"),
        ),
        (OF_ORDER, Reading(verdict="unknown", order_status=None, problem="no status")),
        (
            [OF_ORDER | {"status": "FAILED"}],
            Reading(verdict="unknown", order_status=None, problem="no JSON object"),
        ),
        (
            b'{"status":"FAILED"',
            Reading(verdict="unknown", order_status=None, problem="no JSON object"),
        ),
        (
            b'{"a":' * 100_000,
            Reading(verdict="unknown", order_status=None, problem="no JSON object"),
        ),
        (b"", Reading(verdict="unknown", order_status=None, problem="no JSON object")),
    ],
)
def test_what_a_status_response_says(content: Any, reading: Reading) -> None:
    assert read_status(200, JSON, encoded(content), ORDER) == reading


@pytest.mark.parametrize("status", [201, 204, 206, 301, 304, 400, 404, 410, 500, 503])
def test_only_200_tells_a_status(status: int) -> None:
    body = encoded(OF_ORDER | {"status": "FAILED"})
    assert read_status(status, JSON, body, ORDER) == Reading(
        verdict="unknown", order_status=None, problem=str(status)
    )


@pytest.mark.parametrize(
    ("content_type", "problem"),
    [
        (None, "not JSON"),
        ("text/html", "not JSON"),
        ("text/plain; x=/json", "not JSON"),
        ("application/vnd.order+json", None),
        ("APPLICATION/JSON", None),
    ],
)
def test_only_json_tells_a_status(content_type: str | None, problem: str | None) -> None:
    body = encoded(OF_ORDER | {"status": "FAILED"})
    assert read_status(200, content_type, body, ORDER).problem == problem


@pytest.mark.parametrize("word", ["a\nb", "\x1b[31m", "\u202e" * 100, "x" * 5000, "\0", "\u2028"])
def test_a_word_is_one_short_line(word: str) -> None:
    shown = read_status(200, JSON, encoded({"status": word}), ORDER).order_status
    assert shown is not None
    assert shown == bounded(word)
    assert shown.isprintable()
    assert len(shown) <= WORD_MAX
