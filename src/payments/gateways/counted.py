"""A gateway whose every call is counted and timed."""

import asyncio
import re
import time
from collections.abc import Awaitable
from typing import TypeVar
from uuid import UUID

from loguru import logger

from payments.gateways import (
    Gateway,
    NeverSent,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    declines_may_turn_s,
)
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.observability.tracing import span
from payments.payment.state import Approved, Declined

_OUTCOME_LABELS = {Approved: "approved", Declined: "declined", type(None): "not_found"}

# A gateway keeps its timeout by itself; one that hangs would hold a slot of those for good.
GRACE_S = 1.0

# Without the two that JSON escapes: captures are compared by the stored bytes.
_WORD = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]{1,255}")

T = TypeVar("T", bound=Approved | Declined | None)


class CountedGateway:
    """Passes every call on. Whatever else than its two exceptions a gateway raises is a defect of
    it, and becomes OutcomeUnknown: the provider may have been reached."""

    def __init__(self, gateway: Gateway, telemetry: Telemetry) -> None:
        self._gateway = gateway
        self._telemetry = telemetry
        self._repeats = Repeats()
        self.name = gateway.name
        self.safe_retry_s = gateway.safe_retry_s
        self.late_capture_s = gateway.late_capture_s
        self.declines_may_turn_s = declines_may_turn_s(gateway)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        return await self._counted("charge", self._gateway.charge(charge, timeout_s), timeout_s)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        return await self._counted(
            "find_charge", self._gateway.find_charge(payment_id, timeout_s), timeout_s
        )

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        return await self._counted("refund", self._gateway.refund(refund, timeout_s), timeout_s)

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        return await self._counted(
            "find_refund", self._gateway.find_refund(refund, timeout_s), timeout_s
        )

    async def close(self) -> None:
        await self._gateway.close()

    async def _counted(self, operation: str, call: Awaitable[T], timeout_s: float) -> T:
        started = time.perf_counter()
        outcome = "unknown"
        try:
            with span(f"gateway {operation}", kind="client"):
                async with asyncio.timeout(timeout_s + GRACE_S):
                    answer = await call
            _check_storable(answer)
            outcome = _OUTCOME_LABELS[type(answer)]
        except NeverSent:
            outcome = "never_sent"
            raise
        except OutcomeUnknown as error:
            logger.bind(operation=operation, reason=str(error)).info("the provider gave no outcome")
            raise
        except TimeoutError as error:
            message = "the gateway exceeded its timeout"
            self._repeats.tell("ERROR", message, of=operation, operation=operation)
            raise OutcomeUnknown("the gateway exceeded its timeout") from error
        except Exception as error:
            what = f"{operation} {type(error).__name__}"
            message = "the gateway failed"
            self._repeats.tell("ERROR", message, of=what, exception=error, operation=operation)
            raise OutcomeUnknown("the gateway failed") from error
        finally:
            self._telemetry.gateway_calls[operation, outcome].inc()
        self._telemetry.gateway_seconds[operation].observe(time.perf_counter() - started)
        return answer


def _check_storable(answer: Approved | Declined | None) -> None:
    """What the provider calls things goes into events and text columns."""
    if answer is None:
        return
    word = answer.provider_txn_id if isinstance(answer, Approved) else answer.code
    if not _WORD.fullmatch(word):
        raise ValueError(
            "the provider's id or code is not 1 to 255 printable ASCII characters without "
            "quotation marks and backslashes"
        )
