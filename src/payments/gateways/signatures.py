"""Signatures of webhooks: a hexadecimal HMAC-SHA256, under one of several secrets."""

import hashlib
import hmac
from collections.abc import Iterable


def is_signed(message: bytes, signatures: Iterable[str], secrets: Iterable[str]) -> bool:
    """Whether one of the signatures is that of the message under one of the secrets; there are
    several of each while a secret is replaced. Takes as long for a wrong one as for the right one.
    """
    expected = [hmac.new(each.encode(), message, hashlib.sha256).hexdigest() for each in secrets]
    given = [each.encode("utf-8", "replace") for each in signatures]
    matches = [hmac.compare_digest(own.encode(), other) for own in expected for other in given]
    return any(matches)
