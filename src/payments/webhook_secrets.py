"""Secrets that sign callbacks, in the format of Standard Webhooks 1.0 (standardwebhooks.com)."""

import base64
import re

# 16 characters are 12 bytes. The standard requires 24 to 64; shorter and longer ones are in use.
_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]{16,})={0,2}")


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """The keys of `whsec_BASE64`, or of several separated by commas, in this order. Raises
    ValueError, which does not contain the text."""
    return tuple(_key(part) for part in re.split(", *", text))


def _key(secret: str) -> bytes:
    match = _SECRET.fullmatch(secret)
    # Some tools omit the padding; one character after whole groups of four is invalid base64.
    if match is None or len(match[1]) % 4 == 1:
        raise ValueError(
            "must be whsec_ and the base64 of 12 bytes or more (24 are usual); several are "
            "separated by commas"
        )
    return base64.b64decode(match[1] + "=" * (-len(match[1]) % 4))
