"""Gateways to the provider of tests/doubles/provider.py: the shapes that real ones have.

HttpGateway        the provider knows a charge by our id, and captures or declines at once
PreparingGateway   it knows only references of its own, and charges in steps
"""

import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    Hint,
    NextAction,
    Open,
    OutcomeUnknown,
    PlainGateway,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
    Refusal,
    Step,
)
from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.payment.state import Approved, Declined
from payments.settings import Settings

DAY_S = 24 * 3600.0
SIGNATURE_HEADER = "provider-signature"
SIGNATURE_AGE_MAX_S = 300.0

# Printable ASCII, as every provider's ids and codes: what is stored must be storable.
Word = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,255}\Z")]


class Captured(msgspec.Struct, frozen=True, tag_field="status", tag="captured"):
    id: UUID
    txn_id: Word
    amount_cents: int
    currency: str


class Refunded(msgspec.Struct, frozen=True, tag_field="status", tag="refunded"):
    id: UUID
    txn_id: Word
    amount_cents: int
    currency: str


class Refused(msgspec.Struct, frozen=True, tag_field="status", tag="declined"):
    id: UUID
    code: Word


class InSteps(msgspec.Struct, frozen=True):
    """A charge that goes by a reference. The provider learns our id of one that the customer made
    when it is first charged."""

    status: Step | Literal["captured", "declined"]
    reference: Word
    id: UUID | None
    amount_cents: int
    currency: str
    txn_id: Word = ""
    code: Word = ""
    action_url: str = ""
    client_secret: str = ""


class UnknownReference(msgspec.Struct, frozen=True, tag_field="error", tag="not_found"):
    reference: str


class Account(msgspec.Struct, frozen=True):
    id: Word


class Event(msgspec.Struct, frozen=True):
    """A webhook. What it says of the charge besides is not read: it may be old or out of order."""

    id: Word
    payment_id: UUID | None = None
    reference: Word | None = None


class NotFound(msgspec.Struct, frozen=True, tag_field="error", tag="not_found"):
    id: UUID


_CHARGE: msgspec.json.Decoder[Captured | Refused] = msgspec.json.Decoder(Captured | Refused)
_REFUND: msgspec.json.Decoder[Refunded | Refused] = msgspec.json.Decoder(Refunded | Refused)
_IN_STEPS = msgspec.json.Decoder(InSteps)
_UNKNOWN_REFERENCE = msgspec.json.Decoder(UnknownReference)
_ACCOUNT = msgspec.json.Decoder(Account)
_EVENT = msgspec.json.Decoder(Event)
_NOT_FOUND = msgspec.json.Decoder(NotFound)

Stated = TypeVar("Stated", bound=Captured | Refunded | Refused)


class HttpGateway(PlainGateway):
    name = "test_provider"

    def __init__(
        self,
        http: ProviderHttp,
        *,
        retry_s: float = DAY_S,
        late_capture_s: float = DAY_S,
        webhook_secrets: Sequence[str] = (),
    ) -> None:
        """Of `webhook_secrets` any is taken: there are two while one replaces the other."""
        self._http = http
        self._webhook_secrets = webhook_secrets
        self.charge_retry_s = self.refund_retry_s = retry_s
        self.late_capture_s = late_capture_s

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        body = {
            "amount_cents": charge.amount_cents,
            "currency": charge.currency,
            "payment_method": charge.payment_method,
        }
        answer = await self._post("/charges", charge.payment_id, body, timeout_s)
        return _outcome(answer, charge.payment_id, _CHARGE)

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        payment_id = charge.payment_id
        answer = await self._http.exchange("GET", f"/charges/{payment_id}", timeout_s=timeout_s)
        return None if _not_found(answer, payment_id) else _outcome(answer, payment_id, _CHARGE)

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        body = {
            "charge_txn_id": refund.provider_txn_id,
            "amount_cents": refund.amount_cents,
            "currency": refund.currency,
        }
        answer = await self._post("/refunds", refund.refund_id, body, timeout_s)
        return _outcome(answer, refund.refund_id, _REFUND)

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        refund_id = refund.refund_id
        answer = await self._http.exchange("GET", f"/refunds/{refund_id}", timeout_s=timeout_s)
        return None if _not_found(answer, refund_id) else _outcome(answer, refund_id, _REFUND)

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        """The header is t=SECONDS,v1=HEX, the HMAC-SHA256 of the time, a dot and the raw body."""
        sent_at, _, signature = headers.get(SIGNATURE_HEADER, "").partition(",")
        expected = [f"v1={_signature(each, sent_at, raw_body)}" for each in self._webhook_secrets]
        if not any(hmac.compare_digest(signature.encode(), each.encode()) for each in expected):
            raise BadSignature("the signature is not the provider's")
        if abs(time.time() - float(sent_at.removeprefix("t="))) > SIGNATURE_AGE_MAX_S:
            raise BadSignature("the signature is too old")
        try:
            event = _EVENT.decode(raw_body)
        except msgspec.MsgspecError:
            return None  # the provider's, and not about a payment
        if event.payment_id is None and event.reference is None:
            return None
        return Hint(event_id=event.id, payment_id=event.payment_id, reference=event.reference)

    async def close(self) -> None:
        await self._http.close()

    async def _post(
        self, path: str, key: UUID, body: dict[str, object], timeout_s: float
    ) -> ProviderResponse:
        headers = {"Idempotency-Key": str(key)}
        return await self._http.exchange(
            "POST", path, timeout_s=timeout_s, headers=headers, body=body
        )


class PreparingGateway(HttpGateway):
    name = "test_preparing"
    knows_our_id = False

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        if charge.payment_method == "pm_refused":
            return Refusal("payment_method", "is one that this provider does not take")
        return None

    def reference(self, charge: ProviderCharge) -> str | None:
        """A reference as payment method is a charge that the customer made at the provider."""
        method = charge.payment_method
        return method if method is not None and method.startswith("ref_") else None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return self.reference(charge) is None

    async def account(self, timeout_s: float) -> str | None:
        answer = await self._http.exchange("GET", "/account", timeout_s=timeout_s)
        return answer.read(_ACCOUNT).id if answer.status == 200 else answer.unexpected()

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str:
        answer = await self._in_steps("POST", "/intents", charge, timeout_s, _form(charge))
        stated = _stated(answer, charge)
        if stated.id != charge.payment_id:
            raise OutcomeUnknown("the provider prepared something else")
        return stated.reference

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        form = _form(charge) | {
            "payment_method": charge.payment_method,
            "return_url": charge.return_url,
        }
        path = f"/intents/{charge.reference}/confirm"
        answer = await self._in_steps("POST", path, charge, timeout_s, form)
        return _step(_stated(answer, charge), charge)

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        path = f"/intents/{charge.reference}"
        answer = await self._in_steps("GET", path, charge, timeout_s)
        return _step(_stated(answer, charge), charge)

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        path = f"/intents/{charge.reference}/cancel"
        answer = await self._in_steps("POST", path, charge, timeout_s)
        return _step(_stated(answer, charge), charge)

    async def _in_steps(
        self,
        method: str,
        path: str,
        charge: ProviderCharge,
        timeout_s: float,
        form: dict[str, object] | None = None,
    ) -> ProviderResponse:
        key = {"Idempotency-Key": str(charge.payment_id)}
        headers = key if path == "/intents" else {}
        return await self._http.exchange(
            method, path, timeout_s=timeout_s, headers=headers, form=form
        )


def signed(secret: str, sent_at: float, raw_body: bytes) -> dict[str, str]:
    """The header of a webhook that the provider sends."""
    stamp = f"t={sent_at:.0f}"
    return {SIGNATURE_HEADER: f"{stamp},v1={_signature(secret, stamp, raw_body)}"}


def _signature(secret: str, stamp: str, raw_body: bytes) -> str:
    signed_text = stamp.removeprefix("t=").encode() + b"." + raw_body
    return hmac.new(secret.encode(), signed_text, hashlib.sha256).hexdigest()


def _form(charge: ProviderCharge) -> dict[str, object]:
    """The same bytes for the same payment, however it is asked for: not the payment method."""
    return {
        "amount_cents": charge.amount_cents,
        "currency": charge.currency,
        "metadata": {"payment_id": charge.payment_id},
    }


def _outcome(
    answer: ProviderResponse, asked: UUID, decoder: msgspec.json.Decoder[Stated]
) -> Approved | Declined:
    """What a 2xx answer states; any other answer leaves the outcome unknown."""
    if not 200 <= answer.status < 300:
        answer.unexpected()
    stated = answer.read(decoder)
    if isinstance(stated, Refused):
        if stated.id != asked:  # Declined has no id that the caller could compare
            raise OutcomeUnknown("the provider declined something else")
        return Declined(stated.code)
    return Approved(
        id=stated.id,
        amount_cents=stated.amount_cents,
        currency=stated.currency,
        provider_txn_id=stated.txn_id,
    )


def _stated(answer: ProviderResponse, charge: ProviderCharge) -> InSteps:
    """What a 2xx response states of the charge with this reference, if there was one."""
    if answer.status == 404 and charge.reference is not None:
        if answer.read(_UNKNOWN_REFERENCE).reference == charge.reference:
            raise ReferenceNotFound("the provider does not know its reference of the charge")
        raise OutcomeUnknown("the provider answered about something else")
    if not 200 <= answer.status < 300:
        answer.unexpected()
    stated = answer.read(_IN_STEPS)
    if charge.reference not in (None, stated.reference):
        raise OutcomeUnknown("the provider answered about something else")
    return stated


def _step(stated: InSteps, charge: ProviderCharge) -> Approved | Declined | Open:
    payment_id = stated.id or charge.payment_id
    if stated.status == "captured":
        return Approved(
            id=payment_id,
            amount_cents=stated.amount_cents,
            currency=stated.currency,
            provider_txn_id=stated.txn_id,
        )
    if stated.status == "declined":
        if payment_id != charge.payment_id:  # Declined has no id that the caller could compare
            raise OutcomeUnknown("the provider declined something else")
        return Declined(stated.code)
    action = None
    if stated.status == "action":
        fields = {"url": stated.action_url, "client_secret": stated.client_secret}
        action = NextAction(type="redirect", fields=fields)
    return Open(id=payment_id, step=stated.status, action=action)


def _not_found(answer: ProviderResponse, asked: UUID) -> bool:
    """Whether the provider itself says so: a server in front of it answers 404 as well."""
    if answer.status != 404:
        return False
    return answer.read(_NOT_FOUND).id == asked


def build(settings: Settings) -> HttpGateway:
    """`GATEWAY=tests.doubles.http_gateway:build`; TEST_PROVIDER_URL says where the provider is.
    With TEST_PROVIDER_PREPARES=1 it is charged in steps. TEST_PROVIDER_WEBHOOK_SECRETS, separated
    by commas, are those that it signs webhooks with."""
    if not (url := os.environ.get("TEST_PROVIDER_URL")):
        raise StartError("TEST_PROVIDER_URL must be set for this gateway")
    try:
        retry_s = float(os.environ.get("TEST_PROVIDER_RETRY_S", DAY_S))
        http = ProviderHttp(url)
    except ValueError:
        raise StartError("TEST_PROVIDER_URL or TEST_PROVIDER_RETRY_S is not valid") from None
    prepares = os.environ.get("TEST_PROVIDER_PREPARES") == "1"
    secrets = [
        each for each in os.environ.get("TEST_PROVIDER_WEBHOOK_SECRETS", "").split(",") if each
    ]
    kind = PreparingGateway if prepares else HttpGateway
    return kind(http, retry_s=retry_s, webhook_secrets=secrets)
