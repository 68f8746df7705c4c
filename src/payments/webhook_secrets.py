"""Secrets that sign callbacks, as Standard Webhooks 1.0 writes them (standardwebhooks.com)."""

import base64
import re

# 16 characters are 12 bytes. The standard asks for 24 to 64; shorter and longer ones are in use.
_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]{16,})={0,2}")


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """The keys of `whsec_BASE64`, or of several such with commas between them; the first signs
    first. Raises ValueError, which repeats nothing of the text."""
    return tuple(_key(part) for part in re.split(", *", text))


def _key(secret: str) -> bytes:
    match = _SECRET.fullmatch(secret)
    # Some tools leave the padding out; one character beyond whole groups of four is half a byte.
    if match is None or len(match[1]) % 4 == 1:
        raise ValueError(
            "must be whsec_ and the base64 of 12 bytes or more (24 are usual); several are "
            "separated by commas"
        )
    return base64.b64decode(match[1] + "=" * (-len(match[1]) % 4))
