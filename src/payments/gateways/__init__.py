"""Payment providers behind one protocol.

The provider gets our payment id as its idempotency key. What it answered is a type; not knowing
what it did is an exception, and so is knowing that it was never asked. The difference is money:
a command may answer "try again" only after NeverSent.

building.py          the providers that the settings name, built
http.py              HTTP for gateways: one bounded exchange, and whether it may have been sent
adapters.py          what the adapters of providers share: address, repeated exchanges
counted.py           a gateway whose every call is counted and timed
units.py             amounts in the providers' units
signatures.py        whether a webhook was signed with one of our secrets
stripe.py            Stripe: a PaymentIntent for each charge
stripe_call.py       the exchanges of one call of it, within one deadline
stripe_objects.py    what Stripe states, and what it means
stripe_account.py    its settings and account, and which charges it takes
razorpay.py          Razorpay; razorpay_api.py its calls, razorpay_entities.py what it states
simulated.py         the simulated provider, the default
ledger_file.py       what that one has decided, for all processes and over every crash
ledger_tables.py     that file's tables, and how it is opened
simulated_ledger.py  that file in the event loop, and in a thread where that would wait
earlier_ledger.py    reads in the ledgers of earlier versions, once
accounts.py          whether its account is the one that this database's payments are in
chosen.py            which provider a payment belongs to
breaker.py           whether anything new is begun at one that may be down
simulated_methods.py what a payment method has the simulated provider play
oauth.py             HTTP with a bearer token that the provider gives for the client's credentials
paypal.py            PayPal
paypal_api.py        requests to it, and what its rejections mean
paypal_orders.py     its orders, and what they mean for a charge or a refund
paypal_webhooks.py   whether one of its webhooks is genuine, and what it is about
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol
from uuid import UUID

import msgspec

from payments.payment.state import Approved, Declined

Step = Literal["ready", "action", "authorized", "processing"]


class _NotAnswered(Exception):
    """`is_outage`: the provider was down or overloaded. The breaker counts it."""

    def __init__(self, reason: str = "", *, is_outage: bool | None = None) -> None:
        super().__init__(reason)
        self.is_outage = self.outage_by_default if is_outage is None else is_outage

    outage_by_default = False


class OutcomeUnknown(_NotAnswered):
    """The provider may have been reached, and what it did is not known: ask it later.

    Set `is_outage` for a timeout, a reset, 401, 429 and 5xx; not for a response without sense,
    which shows that the provider is up.
    """


class NeverSent(_NotAnswered):
    """The request surely did not reach the provider: nothing was captured by it.

    It is an outage unless `is_outage` says that the reason lies here.
    """

    outage_by_default = True


class ReferenceNotFound(OutcomeUnknown):
    """The provider does not know a reference. It is no proof that nothing was captured: the API key
    may be that of another account or mode. `charge` raises it only if it asked for no capture."""


class ProviderCharge(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider is asked to capture. `payment_id` is its idempotency key.

    `reference` is the provider's own id of the charge, as stored; None before `prepare`, and for a
    provider that knows the charge by our id. `payment_method` and `return_url` are known only while
    a request is served: they are never stored. `order_id` and `idempotency_key` are the client's;
    they are in the log, so each call of `prepare` for a payment has the same.
    """

    payment_id: UUID
    amount_cents: int
    currency: str
    reference: str | None = None
    payment_method: str | None = None
    return_url: str | None = None
    order_id: UUID | None = None
    idempotency_key: str | None = None


class ProviderRefund(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider is asked to give back. `refund_id` is its idempotency key.

    `provider_txn_id` is the provider's own id of the capture that the money comes from, `reference`
    that of the charge, if it has one.
    """

    refund_id: UUID
    payment_id: UUID
    provider_txn_id: str
    amount_cents: int
    currency: str
    reference: str | None = None


class NextAction(msgspec.Struct, frozen=True, kw_only=True):
    """What the customer has to do, for the client: `type` as in {"type": "redirect", "url": …},
    and the other fields. It may hold secrets, and is never stored or logged."""

    type: str
    fields: dict[str, str]

    def __repr__(self) -> str:
        return f"NextAction({self.type!r})"


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """The provider has captured nothing yet, and still may. `id` is our payment's, as the provider
    states it.

    ready         it captures when `charge` is called again
    action        it captures when the customer has acted, as `action` says
    authorized    the customer's part is done; it captures when `charge` is called again
    processing    it captures by itself, or declines: only waiting helps
    """

    id: UUID
    step: Step
    action: NextAction | None = None


class Refusal(NamedTuple):
    """Why a provider cannot take a charge: the request's field, and what it must be."""

    field: Literal["amount_cents", "currency", "payment_method", "return_url"]
    message: str


class Hint(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook is about: a payment to be asked about now. Nothing else is taken from it.

    `event_id` is the provider's, the same for each delivery; and either our `payment_id`, or the
    provider's `reference` of the charge.
    """

    event_id: str
    payment_id: UUID | None = None
    reference: str | None = None


class BadSignature(Exception):
    """A webhook is not the provider's, was altered, or is too old. The message holds no secret."""


class Gateway(Protocol):
    """A payment provider. docs/gateways.md says how to write one.

    Each call returns within about `timeout_s` seconds, or raises OutcomeUnknown or NeverSent.
    What it returns is what the provider says, unchanged: whether id, amount and currency are those
    that were asked for is checked by the caller.

    `knows_our_id`: the provider finds a charge by our payment id, without a reference. Of any other
    provider, nothing was captured for a payment without one.
    `charge_retry_s`, `refund_retry_s`: for how many seconds after the first sending the provider
    surely remembers an idempotency key. Within it, `charge`, or `refund`, may be sent again; after
    it, only asking is safe.
    `late_capture_s`: for how long after the first sending a charge that the provider did not know
    of, or that could not be cancelled, may still be captured; it is asked about for at least a day,
    and while it is processing.
    `declines_may_turn_s`: for how long after a decline the provider may capture the charge after
    all; it is asked about once at the end of it, and what was captured goes back. 0: never.
    """

    @property
    def name(self) -> str: ...

    @property
    def knows_our_id(self) -> bool: ...

    @property
    def charge_retry_s(self) -> float: ...

    @property
    def refund_retry_s(self) -> float: ...

    @property
    def late_capture_s(self) -> float: ...

    @property
    def declines_may_turn_s(self) -> float: ...

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        """Why this charge cannot be sent, from what is known here alone; no call, no side effect.
        It is asked before anything is stored. The message does not repeat the payment method."""
        ...

    def reference(self, charge: ProviderCharge) -> str | None:
        """The provider's id of the charge, if the payment method names it; no call. It is stored
        with the intent, and no second payment can have it."""
        ...

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        """Whether `prepare` has to come before `charge`; no call."""
        ...

    async def account(self, timeout_s: float) -> str | None:
        """The id of the account that the credentials belong to; None if there is no such thing.
        It stays the same when the credentials are replaced."""
        ...

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        """Makes the provider's own charge, and returns its id. No money moves. The same one,
        however often it is called within `charge_retry_s`, and whether or not the payment method
        and the return address are known by then. Declined: the provider takes no such charge, as
        one below its least amount, and made none."""
        ...

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        """Captures once per payment id, however often it is called. An Open(authorized) is
        completed without payment method and return address."""
        ...

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        """What became of a charge. None: the provider finds charges by our id, has none for this
        payment, and documents that this means that it captured nothing. A provider that does not
        know its own reference any more raises ReferenceNotFound."""
        ...

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        """Makes sure that nothing is captured any more, if the provider can: Declined then. Else
        what `find_charge` says."""
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


class WebhookGateway(Gateway, Protocol):
    """A gateway whose provider sends webhooks."""

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        """What a webhook is about; None if about no payment. The names of `headers` are in lower
        case. Raises BadSignature before it reads the body; OutcomeUnknown or NeverSent if the
        provider has to be asked whether it is genuine, and does not say so."""
        ...


class ProviderFinding(NamedTuple):
    """What `payments doctor` says about a provider, in one line; if `bad`, with the next step."""

    bad: bool
    text: str


class CheckedGateway(Gateway, Protocol):
    """A gateway that can check its credentials and its account."""

    async def findings(self, timeout_s: float) -> list[ProviderFinding]:
        """Moves no money and changes nothing; raises OutcomeUnknown or NeverSent."""
        ...


class PlainGateway:
    """What is left of the protocol for a provider that knows a charge by our id, captures or
    declines at once, and takes every charge: to be derived from."""

    knows_our_id = True
    declines_may_turn_s = 0.0

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        return None

    def reference(self, charge: ProviderCharge) -> str | None:
        return None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return False

    async def account(self, timeout_s: float) -> str | None:
        return None

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        raise OutcomeUnknown("there is nothing to be prepared")

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return await self.find_charge(charge, timeout_s)

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        raise NotImplementedError
