"""Payment providers behind one protocol.

The provider gets our payment id as its idempotency key. What it answered is a type; not knowing
what it did is an exception, and so is knowing that it was never asked. The difference is money:
a command may answer "try again" only after NeverSent.
"""

from typing import Protocol
from uuid import UUID

import msgspec

from payments.payment import Approved, Declined


class OutcomeUnknown(Exception):
    """The provider may have been reached, and what it did is not known: ask it later."""


class NeverSent(Exception):
    """The request surely did not reach the provider: nothing was captured by it."""


class ProviderCharge(msgspec.Struct, frozen=True):
    """What a provider is asked to capture. `payment_id` is its idempotency key."""

    payment_id: UUID
    amount_cents: int
    currency: str
    payment_method: str | None = None


class Gateway(Protocol):
    """A payment provider.

    `safe_retry_s`: for how many seconds after the first charge the provider surely remembers the
    idempotency key. Within it, `charge` may be sent again; after it, only `find_charge` is safe.
    """

    @property
    def name(self) -> str: ...

    @property
    def safe_retry_s(self) -> float: ...

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        """Captures once per payment id, however often it is called.

        Returns within about `timeout_s` seconds, or raises OutcomeUnknown or NeverSent.
        """
        ...

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        """What became of a charge; None if the provider has none for this payment.

        Raises OutcomeUnknown or NeverSent if it cannot be found out now.
        """
        ...

    async def close(self) -> None: ...
