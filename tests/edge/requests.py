"""Well-formed requests as bytes, every part of which can be replaced by a bad one."""

import itertools
from typing import NamedTuple

ORDER = b"f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"
BODY = b'{"merchant_order_id": "%s", "amount_cents": 1500}' % ORDER
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HALF = len(BODY) // 2

_numbers = itertools.count()


def charge(
    body: bytes = BODY,
    *,
    line: bytes = b"POST /v1/charge HTTP/1.1\r\n",
    host: bytes = b"Host: x\r\n",
    media_type: bytes = JSON,
    key: bytes | None = None,  # the whole header; by default one that no other request has
    length: bytes | None = None,  # the header that frames the body
    more: bytes = b"",
) -> bytes:
    key = b"Idempotency-Key: raw-%d\r\n" % next(_numbers) if key is None else key
    length = b"Content-Length: %d\r\n" % len(body) if length is None else length
    return line + host + media_type + key + more + length + b"\r\n" + body


def get(
    target: bytes = b"/health/live",
    *,
    method: bytes = b"GET",
    version: bytes = b"HTTP/1.1",
    host: bytes = b"Host: x\r\n",
    more: bytes = b"",
) -> bytes:
    return b"%s %s %s\r\n" % (method, target, version) + host + more + b"\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def chunked(raw: bytes, *, coding: bytes = CHUNKED, key: bytes | None = None) -> bytes:
    """A charge with these bytes after the head, where the chunks have to be."""
    return charge(b"", key=key, length=coding) + raw


LAST_CHUNK = b"0\r\n\r\n"
IN_TWO_CHUNKS = chunk(BODY[:HALF]) + chunk(BODY[HALF:]) + LAST_CHUNK

# Answers: the status, the problem's code, and whether the connection ends there.
MALFORMED = "400 malformed_request closed"
INVALID = "400 invalid_request"
BAD_KEY = "400 invalid_idempotency_key"
NOT_JSON = "415 unsupported_media_type"
TOO_LARGE = "413 body_too_large closed"
NOT_FOUND = "404 not_found"
NOT_ALLOWED = "405 method_not_allowed"


class Row(NamedTuple):
    name: str
    sent: bytes
    answers: tuple[str, ...]


def row(name: str, sent: bytes, *answers: str) -> Row:
    return Row(name, sent, answers)
