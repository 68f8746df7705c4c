"""Normalises header sections of responses, so that aiohttp's parser accepts all that HTTP allows.

It rejects a repeated equal Content-Length (RFC 9110 section 8.6), a Content-Length beside chunks,
which override it (RFC 9112 section 6.3), a later minor version (RFC 9110 section 2.5), reason
phrases that are not UTF-8, and control characters in values. Only the fields that state the end of
the response, keep-alive, Retry-After and the media type are kept; no other can do harm then.
"""

import re

_KEPT = (
    *(b"transfer-encoding", b"content-length", b"connection", b"upgrade"),
    *(b"retry-after", b"content-type"),
)
_PRINTABLE = re.compile(rb"[ -~]*")

# The end of a header section; some servers omit the \r. Not an empty line before it.
_END = re.compile(rb"[^\r\n]\r?\n\r?\n")
_END_BYTES_MAX = 5

_BEGINNING = re.compile(rb"[\r\n]*([^\r\n]{1,5})")
_FOLD = re.compile(rb"\r?\n[ \t]+")  # RFC 9112 section 5.2: equals a space
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([0-9]{3})(?:[ \t].*)?\r?", re.DOTALL)
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:(.*)", re.DOTALL)


def find_head_end(data: bytes, looked_at: int) -> int | None:
    """The end of the first header section in the data; None if it is incomplete. The first
    `looked_at` bytes were searched before."""
    found = _END.search(data, max(0, looked_at + 1 - _END_BYTES_MAX))
    return found.end() if found else None


def is_http(data: bytes) -> bool:
    """Whether the data may be the beginning of a header section."""
    begun = _BEGINNING.match(data)
    return begun is None or b"HTTP/".startswith(begun[1])


def plain(head: bytes) -> bytes:
    """The normalised header section. Invalid data is returned unchanged; the parser rejects it."""
    first, *lines = _FOLD.sub(b" ", head.strip(b"\r\n")).split(b"\n")
    status_line = _STATUS_LINE.fullmatch(first)
    if status_line is None:
        return head
    fields: dict[bytes, list[bytes]] = {name: [] for name in _KEPT}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            return head
        if (name := field[1].lower()) in fields:
            fields[name].append(field[2].strip(b" \t\r"))
    minor, status = status_line.groups()
    _frame(fields)
    written = [b"HTTP/1.%d %s " % (minor != b"0", status)]
    written += [b"%s: %s" % (name, value) for name in _KEPT for value in fields[name]]
    return b"\r\n".join([*written, b"", b""])


def _frame(fields: dict[bytes, list[bytes]]) -> None:
    """Keeps one way to find the end of the response: RFC 9112 section 6.3."""
    lengths = {part.strip() for value in fields[b"content-length"] for part in value.split(b",")}
    if lengths and fields[b"transfer-encoding"]:
        lengths.clear()
        fields[b"connection"] = [b"close"]  # other readers may see two responses
    fields[b"content-length"] = sorted(lengths)  # the parser rejects several
    del fields[b"retry-after"][1:]
    kinds = [value for value in fields[b"content-type"] if _PRINTABLE.fullmatch(value)]
    fields[b"content-type"] = kinds[:1]
