"""A gateway to the provider of tests/doubles/provider.py: the shape that a real one has."""

import os
from typing import Annotated, TypeVar
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.payment.state import Approved, Declined
from payments.settings import Settings

DAY_S = 24 * 3600.0

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


class NotFound(msgspec.Struct, frozen=True, tag_field="error", tag="not_found"):
    id: UUID


_CHARGE: msgspec.json.Decoder[Captured | Refused] = msgspec.json.Decoder(Captured | Refused)
_REFUND: msgspec.json.Decoder[Refunded | Refused] = msgspec.json.Decoder(Refunded | Refused)
_NOT_FOUND = msgspec.json.Decoder(NotFound)

Stated = TypeVar("Stated", bound=Captured | Refunded | Refused)


class HttpGateway:
    name = "test_provider"

    def __init__(
        self,
        http: ProviderHttp,
        *,
        safe_retry_s: float = DAY_S,
        late_capture_s: float = DAY_S,
    ) -> None:
        self._http = http
        self.safe_retry_s = safe_retry_s
        self.late_capture_s = late_capture_s

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        body = {
            "amount_cents": charge.amount_cents,
            "currency": charge.currency,
            "payment_method": charge.payment_method,
        }
        answer = await self._post("/charges", charge.payment_id, body, timeout_s)
        return _outcome(answer, charge.payment_id, _CHARGE)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
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

    async def close(self) -> None:
        await self._http.close()

    async def _post(
        self, path: str, key: UUID, body: dict[str, object], timeout_s: float
    ) -> ProviderResponse:
        headers = {"Idempotency-Key": str(key)}
        return await self._http.exchange(
            "POST", path, timeout_s=timeout_s, headers=headers, body=body
        )


def _outcome(
    answer: ProviderResponse, asked: UUID, decoder: msgspec.json.Decoder[Stated]
) -> Approved | Declined:
    """What a 2xx answer states; any other answer leaves the outcome unknown."""
    if not 200 <= answer.status < 300:
        raise OutcomeUnknown(f"the provider answered {answer.status}")
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


def _not_found(answer: ProviderResponse, asked: UUID) -> bool:
    """Whether the provider itself says so: a server in front of it answers 404 as well."""
    if answer.status != 404:
        return False
    return answer.read(_NOT_FOUND).id == asked


def build(settings: Settings) -> HttpGateway:
    """`GATEWAY=tests.doubles.http_gateway:build`; TEST_PROVIDER_URL says where the provider is."""
    if not (url := os.environ.get("TEST_PROVIDER_URL")):
        raise StartError("TEST_PROVIDER_URL must be set for this gateway")
    try:
        safe_retry_s = float(os.environ.get("TEST_PROVIDER_SAFE_RETRY_S", DAY_S))
        http = ProviderHttp(url)
    except ValueError:
        raise StartError("TEST_PROVIDER_URL or TEST_PROVIDER_SAFE_RETRY_S is not valid") from None
    return HttpGateway(http, safe_retry_s=safe_retry_s)
