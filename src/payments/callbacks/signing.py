"""Signatures of callbacks, as Standard Webhooks 1.0 describes them (standardwebhooks.com).

The receiver computes HMAC-SHA256 over `id.timestamp.body` with the secret that both sides know, and
accepts a request of which one signature is right and whose timestamp is at most five minutes off.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence

# 16 characters are 12 bytes. The standard asks for 24 to 64; shorter and longer ones are in use.
_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]{16,})={0,2}")


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """The keys of `whsec_BASE64`, or of several such with commas between them; the first signs
    first. Raises ValueError, which repeats nothing of the text."""
    return tuple(_key(part) for part in re.split(", *", text))


def signature_headers(
    secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The three headers of a request; `timestamp` is its Unix time in seconds.

    The message's id stays the same when it is sent again, the timestamp does not. There is one
    signature for each secret: with an old and a new one, receivers may hold either.
    """
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    signatures = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            f"v1,{base64.b64encode(signature).decode()}" for signature in signatures
        ),
    }


def _key(secret: str) -> bytes:
    match = _SECRET.fullmatch(secret)
    # Some tools leave the padding out; one character beyond whole groups of four is half a byte.
    if match is None or len(match[1]) % 4 == 1:
        raise ValueError(
            "must be whsec_ and the base64 of 12 bytes or more (24 are usual); several are "
            "separated by commas"
        )
    return base64.b64decode(match[1] + "=" * (-len(match[1]) % 4))
