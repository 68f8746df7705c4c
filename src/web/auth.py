"""API keys: `Authorization: Bearer KEY`, where PAYMENTS_API_KEYS holds each key's SHA-256.

Without configured keys every request is from the client `default`. The protocol authenticates each
request once, before all other work (serving/door.py).
"""

import hashlib
import hmac

from payments.clients import DEFAULT_CLIENT, ApiKey
from payments.errors import Unauthorized

STAFF = "staff"  # may read and refund every client's payments
SEND_A_KEY = "Send the header Authorization: Bearer, with an API key of this service."
KEY_MAX = 1024  # bytes: anything longer is not a key, and hashing it would waste CPU


def authenticate(headers: list[tuple[bytes, bytes]], keys: tuple[ApiKey, ...]) -> str:
    """The name of the client that sent these headers; raises Unauthorized."""
    if not keys:
        return DEFAULT_CLIENT
    sent = [value for name, value in headers if name == b"authorization"]
    if len(sent) == 1 and len(sent[0]) <= KEY_MAX and sent[0][:7].lower() == b"bearer ":
        # Compare digests, which have equal length, as bytes: compare_digest takes only ASCII text.
        digest = hashlib.sha256(sent[0][7:].strip()).digest()
        found = None
        for key in keys:  # all of them, so that the time does not reveal which one matched
            if hmac.compare_digest(digest, key.sha256):
                found = key.client
        if found is not None:
            return found
    raise Unauthorized(SEND_A_KEY)


def may_read(client: str) -> str | None:
    """Whose payments a client may read: a client name, or None for all payments."""
    return None if client in (STAFF, DEFAULT_CLIENT) else client
