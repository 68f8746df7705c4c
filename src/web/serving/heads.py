"""Checks header sections, more strictly than the parser, as the RFCs require.

Requests that a proxy in front could read differently (request smuggling) are rejected.
"""

import os
import re

from web.problems import (
    HeadTooLarge,
    MalformedRequest,
    Unimplemented,
    UnreadableRequest,
    VersionNotSupported,
)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
Headers = list[tuple[bytes, bytes]]  # names in lower case

HEAD_MAX = 64 * 1024  # bytes of request line and header section
HEADERS_MAX = 100  # header fields: even a short one takes memory
TARGET_MAX = 16 * 1024  # bytes; RFC 9112 section 3 recommends at least 8,000
HEAD_DETAIL = f"Send at most {HEAD_MAX} bytes of headers."
HEADERS_DETAIL = f"Send at most {HEADERS_MAX} header fields."
TARGET_DETAIL = f"Send at most {TARGET_MAX} bytes of path and query."

# RFC 3986 sections 3.2.2 and 3.2.3: a name, IPv4 address or IP literal, and an optional port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# W3C Trace Context, section 3.2: version ff and ids of zeros are invalid; later versions may add
# fields after another dash.
_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


def request_id_of(headers: Headers) -> str:
    """The client's request id if it is safe to log, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return os.urandom(16).hex()


def traceparent_of(headers: Headers) -> str | None:
    """The W3C trace context of a request, None if there is none, or more than one.

    A later version is converted to version 00 (section 4.2): the ids and the sampled flag.
    """
    sent = [value.strip(b" \t") for name, value in headers if name == b"traceparent"]
    match = _TRACEPARENT.fullmatch(sent[0]) if len(sent) == 1 else None
    if match is None:
        return None
    version, ids, flags, more = match.groups()
    if version == b"00":
        return str(sent[0], "ascii") if more is None else None
    return f"00-{str(ids, 'ascii')}-{int(flags, 16) & 1:02x}"


def objection_to(
    method: bytes, target: bytes, version: str, headers: Headers, size: int
) -> UnreadableRequest | None:
    """Why to reject this header section of `size` bytes, and the fix; None if it is valid.

    The parser rejects invalid framing.
    """
    if version not in ("1.0", "1.1"):
        return VersionNotSupported("Send HTTP/1.1.")
    if method == b"CONNECT":
        return Unimplemented("This server is not a proxy: send a path, not an absolute URI.")
    if b"#" in target:
        return MalformedRequest("Send the request without a fragment.")
    hosts, codings = [], []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding":
            codings.append(value.strip().lower())
    if size > HEAD_MAX:
        return HeadTooLarge(HEAD_DETAIL)
    if len(hosts) > 1 or (not hosts and version == "1.1"):  # RFC 9112 section 3.2
        return MalformedRequest("Send the Host header once.")
    if hosts and not _HOST.fullmatch(hosts[0].strip()):
        return MalformedRequest("Send a host name or address, with an optional port, as Host.")
    return _objection_to_codings(codings, version) if codings else None


def _objection_to_codings(codings: list[bytes], version: str) -> UnreadableRequest | None:
    """RFC 9112 section 6.1."""
    if version == "1.0":
        return MalformedRequest("Send Transfer-Encoding with HTTP/1.1 only.")
    # The parser rejects codings that do not end in chunked.
    if codings != [b"chunked"] and codings[-1].rpartition(b",")[2].strip() == b"chunked":
        return Unimplemented("Send no Transfer-Encoding other than chunked.")
    return None
