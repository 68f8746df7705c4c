"""Heads of responses, put so that aiohttp's parser understands all that HTTP allows.

It refuses a length that is said twice, though equal (RFC 9110 section 8.6), a length beside chunks,
which override it (RFC 9112 section 6.3), a minor version to come (RFC 9110 section 2.5), reason
phrases that are not UTF-8, and control characters in values. Of the fields only those matter here
that say where the response ends, whether the connection is kept, when to come again, and of what
kind the body is; no other can do harm then.
"""

import re

_KEPT = (
    *(b"transfer-encoding", b"content-length", b"connection", b"upgrade"),
    *(b"retry-after", b"content-type"),
)
_PRINTABLE = re.compile(rb"[ -~]*")

# The end of a head; lenient servers leave the \r out. Not an empty line before the head.
_END = re.compile(rb"[^\r\n]\r?\n\r?\n")
_END_BYTES_MAX = 5

_BEGINNING = re.compile(rb"[\r\n]*([^\r\n]{1,5})")
_FOLD = re.compile(rb"\r?\n[ \t]+")  # RFC 9112 section 5.2: it stands for a space
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([0-9]{3})(?:[ \t].*)?\r?", re.DOTALL)
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:(.*)", re.DOTALL)


def find_head_end(data: bytes, looked_at: int) -> int | None:
    """Where the first head in the data ends, of which so many bytes were looked at before."""
    found = _END.search(data, max(0, looked_at + 1 - _END_BYTES_MAX))
    return found.end() if found else None


def is_http(data: bytes) -> bool:
    """Whether what begins so may become a head."""
    begun = _BEGINNING.match(data)
    return begun is None or b"HTTP/".startswith(begun[1])


def plain(head: bytes) -> bytes:
    """What matters of a head. What is none is returned as it is, for the parser to refuse."""
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
    """Leaves one way to find the end of the response: RFC 9112 section 6.3."""
    lengths = {part.strip() for value in fields[b"content-length"] for part in value.split(b",")}
    if lengths and fields[b"transfer-encoding"]:
        lengths.clear()
        fields[b"connection"] = [b"close"]  # to others it may be two responses
    fields[b"content-length"] = sorted(lengths)  # several are for the parser to refuse
    del fields[b"retry-after"][1:]
    kinds = [value for value in fields[b"content-type"] if _PRINTABLE.fullmatch(value)]
    fields[b"content-type"] = kinds[:1]
