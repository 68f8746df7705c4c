"""Signatures of callbacks, by Standard Webhooks 1.0 (standardwebhooks.com).

The receiver computes HMAC-SHA256 over `id.timestamp.body` with the shared secret, and accepts a
request if one signature matches and the timestamp is at most five minutes off.
"""

import base64
import hashlib
import hmac
from collections.abc import Sequence


def signature_headers(
    secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The three headers of a request; `timestamp` is its Unix time in seconds.

    A retry has the same message id and a new timestamp. There is one signature for each secret:
    with an old and a new secret, receivers may use either.
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
