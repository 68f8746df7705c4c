"""Payment providers behind one protocol.

The provider gets our payment id as its idempotency key. What it answered is a type; not knowing
what it did is an exception, and so is knowing that it was never asked. The difference is money:
a command may answer "try again" only after NeverSent.

building.py          the provider that the settings name, built
http.py              HTTP for gateways: one bounded exchange, and whether it may have been sent
counted.py           a gateway whose every call is counted and timed
simulated.py         the simulated provider, the default
ledger_file.py       what that one has decided, for all processes and over every crash
ledger_tables.py     that file's tables, and how it is opened
simulated_ledger.py  that file in the event loop, and in a thread where that would wait
earlier_ledger.py    reads in the ledgers of earlier versions, once
ledger_identity.py   whether a ledger is the one of this database's payments
"""

from typing import Protocol
from uuid import UUID

import msgspec

from payments.payment.state import Approved, Declined


class OutcomeUnknown(Exception):
    """The provider may have been reached, and what it did is not known: ask it later."""


class NeverSent(Exception):
    """The request surely did not reach the provider: nothing was captured by it."""


class ProviderCharge(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider is asked to capture. `payment_id` is its idempotency key."""

    payment_id: UUID
    amount_cents: int
    currency: str
    payment_method: str | None = None


class ProviderRefund(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider is asked to give back. `refund_id` is its idempotency key.

    `provider_txn_id` is the provider's own id of the capture that the money comes from.
    """

    refund_id: UUID
    payment_id: UUID
    provider_txn_id: str
    amount_cents: int
    currency: str


class Gateway(Protocol):
    """A payment provider. docs/gateways.md says how to write one.

    Each call returns within about `timeout_s` seconds, or raises OutcomeUnknown or NeverSent.
    What it returns is what the provider says, unchanged: whether id, amount and currency are those
    that were asked for is checked by the caller.

    `safe_retry_s`: for how many seconds after the first sending the provider surely remembers an
    idempotency key. Within it, `charge` and `refund` may be sent again; after it, only asking is
    safe. `late_capture_s`: for how long after the first sending a charge that the provider did not
    know of may still be captured; it is asked about for at least a day. `declines_may_turn_s`: for
    how long after a decline the provider may capture the charge after all; it is asked about once
    at the end of it, and what was captured goes back. A gateway without it never changes its mind.
    """

    @property
    def name(self) -> str: ...

    @property
    def safe_retry_s(self) -> float: ...

    @property
    def late_capture_s(self) -> float: ...

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        """Captures once per payment id, however often it is called."""
        ...

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        """What became of a charge; None if the provider has none for this payment."""
        ...

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        """Gives back once per refund id, however often it is called."""
        ...

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        """What became of a refund; None if the provider has none with this refund id."""
        ...

    async def close(self) -> None: ...


def declines_may_turn_s(gateway: Gateway) -> float:
    """See Gateway; 0 for one that does not have it."""
    return float(getattr(gateway, "declines_may_turn_s", 0.0))
