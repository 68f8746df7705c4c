"""What the head of a request may be: stricter than the parser, by the RFCs' own words.

What two readers of the same bytes could take for different requests is refused, since there may be
a proxy in front that reads them otherwise.
"""

import os
import re

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
Headers = list[tuple[bytes, bytes]]  # names in lower case

Refusal = tuple[int, str]  # status and code

MALFORMED_REQUEST: Refusal = (400, "malformed_request")
TARGET_TOO_LONG: Refusal = (414, "target_too_long")
HEAD_TOO_LARGE: Refusal = (431, "head_too_large")
NOT_IMPLEMENTED: Refusal = (501, "not_implemented")
VERSION_NOT_SUPPORTED: Refusal = (505, "version_not_supported")
PROTOCOL_PROBLEMS = (
    MALFORMED_REQUEST,
    TARGET_TOO_LONG,
    HEAD_TOO_LARGE,
    NOT_IMPLEMENTED,
    VERSION_NOT_SUPPORTED,
)

HEAD_MAX = 64 * 1024  # bytes of one request's line and headers
HEADERS_MAX = 100  # header fields: each takes memory however short it is
TARGET_MAX = 16 * 1024  # bytes; RFC 9112 section 3 wants at least 8,000
HEAD_DETAIL = f"Send at most {HEAD_MAX} bytes of headers."
HEADERS_DETAIL = f"Send at most {HEADERS_MAX} header fields."
TARGET_DETAIL = f"Send at most {TARGET_MAX} bytes of path and query."

# RFC 3986 section 3.2.2 and 3.2.3: a name or IPv4 address, or an IP literal; and a port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(headers: Headers) -> str:
    """The caller's id of the request if it is harmless to log, else a new one."""
    return first_of(headers, b"x-request-id", _REQUEST_ID) or os.urandom(16).hex()


def first_of(headers: Headers, wanted: bytes, form: re.Pattern[bytes]) -> str | None:
    """The first header of this name that has the form."""
    for name, value in headers:
        if name == wanted and form.fullmatch(value):
            return str(value, "ascii")
    return None


def objection_to(
    method: bytes, target: bytes, version: str, headers: Headers, size: int
) -> tuple[Refusal, str] | None:
    """Why to refuse this head, of `size` bytes, and what to do about it; None if it may pass.

    Framing that is not valid at all is the parser's to refuse.
    """
    if version not in ("1.0", "1.1"):
        return VERSION_NOT_SUPPORTED, "Send HTTP/1.1."
    if method == b"CONNECT":
        return NOT_IMPLEMENTED, "This is not a proxy."
    if b"#" in target:
        return MALFORMED_REQUEST, "Send the request without a fragment."
    hosts, codings = [], []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding":
            codings.append(value.strip().lower())
    if size > HEAD_MAX:
        return HEAD_TOO_LARGE, HEAD_DETAIL
    if len(hosts) > 1 or (not hosts and version == "1.1"):  # RFC 9112 section 3.2
        return MALFORMED_REQUEST, "Send the Host header once."
    if hosts and not _HOST.fullmatch(hosts[0].strip()):
        return MALFORMED_REQUEST, "Send a name or address, and maybe a port, as Host."
    return _objection_to_codings(codings, version) if codings else None


def _objection_to_codings(codings: list[bytes], version: str) -> tuple[Refusal, str] | None:
    """RFC 9112 section 6.1."""
    if version == "1.0":
        return MALFORMED_REQUEST, "Send Transfer-Encoding with HTTP/1.1 only."
    # What does not end in chunked is the parser's to refuse.
    if codings != [b"chunked"] and codings[-1].rpartition(b",")[2].strip() == b"chunked":
        return NOT_IMPLEMENTED, "Send no other Transfer-Encoding than chunked."
    return None
