"""A gateway whose every call is counted, timed, and let through by the provider's breaker."""

import asyncio
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar
from uuid import UUID

from loguru import logger

from payments.gateways import (
    BadSignature,
    Gateway,
    Hint,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    Refusal,
)
from payments.gateways.breaker import ProviderBreaker, ProviderPermit
from payments.observability.gateway_metrics import GATEWAY_OUTCOMES
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.observability.tracing import span
from payments.payment.state import Approved, Declined

_OUTCOME_LABELS = {
    Approved: "approved",
    Declined: "declined",
    Open: "open",
    str: "named",
    type(None): "not_found",
}

# A gateway keeps its timeout by itself; one that hangs would hold a slot of those for good.
GRACE_S = 1.0

# Without the two that JSON escapes: captures are compared by the stored bytes.
_WORD = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]{1,255}")

HintCall = Callable[[Mapping[str, str], bytes, float], Awaitable[Hint | None]]

T = TypeVar("T", bound=Approved | Declined | Open | str | None)


class CountedGateway:
    """Passes every call on. Whatever else than its two exceptions a gateway raises is a defect of
    it, and becomes OutcomeUnknown: the provider may have been reached.

    While the breaker is open a call raises NeverSent at once.
    """

    def __init__(
        self,
        gateway: Gateway,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._clock = clock
        self._repeats = Repeats()
        self._breaker = ProviderBreaker()
        self._metrics = telemetry.of_gateway(gateway.name, lambda: self.is_known_down)
        self.name = gateway.name
        self.knows_our_id = gateway.knows_our_id
        self.charge_retry_s = gateway.charge_retry_s
        self.refund_retry_s = gateway.refund_retry_s
        self.late_capture_s = gateway.late_capture_s
        self.declines_may_turn_s = gateway.declines_may_turn_s
        # Each is asked for every charge: no step between.
        self.refuses: Callable[[ProviderCharge], Refusal | None] = gateway.refuses
        self.reference: Callable[[ProviderCharge], str | None] = gateway.reference
        self.needs_preparing: Callable[[ProviderCharge], bool] = gateway.needs_preparing
        hint: HintCall | None = getattr(gateway, "hint", None)
        self._its_hint = hint
        # None: its provider sends no webhooks.
        self.hint = None if hint is None else self._hint

    @property
    def is_known_down(self) -> bool:
        return self._breaker.is_known_down(self._clock())

    def unavailable_for_s(self) -> float:
        """How long to wait before anything new is begun there; 0: not at all."""
        return self._breaker.wait_s(self._clock())

    async def account(self, timeout_s: float) -> str | None:
        return await self._counted("account", lambda: self._gateway.account(timeout_s), timeout_s)

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        return await self._counted(
            "prepare", lambda: self._gateway.prepare(charge, timeout_s), timeout_s
        )

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        return await self._counted(
            "charge", lambda: self._gateway.charge(charge, timeout_s), timeout_s
        )

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return await self._counted(
            "find_charge", lambda: self._gateway.find_charge(charge, timeout_s), timeout_s
        )

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return await self._counted(
            "cancel", lambda: self._gateway.cancel(charge, timeout_s), timeout_s
        )

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        return await self._counted(
            "refund", lambda: self._gateway.refund(refund, timeout_s), timeout_s
        )

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        return await self._counted(
            "find_refund", lambda: self._gateway.find_refund(refund, timeout_s), timeout_s
        )

    async def close(self) -> None:
        await self._gateway.close()

    async def _hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        """Not through the breaker: most providers are not called for it, so it tells nothing of
        them. A defect of the gateway is told without its message, which may repeat what was sent.
        """
        assert self._its_hint is not None
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                hint = await self._its_hint(headers, raw_body, timeout_s)
            if hint is not None:
                _check_hint(hint)
        except (BadSignature, OutcomeUnknown, NeverSent):
            raise
        except TimeoutError:
            self._repeats.tell("ERROR", "the gateway exceeded its timeout", of="hint")
            raise OutcomeUnknown("the gateway exceeded its timeout") from None
        except Exception as error:  # noqa: BLE001 - a webhook that nobody can read
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            reason = f"{type(error).__name__} in {frame.f_code.co_qualname}, line {line}"
            message = "the gateway failed"
            self._repeats.tell("ERROR", message, of=reason, operation="hint", reason=reason)
            raise OutcomeUnknown(message) from None
        return hint

    async def _counted(
        self, operation: str, call: Callable[[], Awaitable[T]], timeout_s: float
    ) -> T:
        permit = self._breaker.begin(self._clock())
        if permit is None:
            self._metrics.calls[operation, "not_called"].inc()
            raise NeverSent(f"the provider {self.name} is down", is_outage=False)
        started = time.perf_counter()
        outcome, failed = "unknown", None
        try:
            with span(f"gateway {operation}", kind="client"):
                async with asyncio.timeout(timeout_s + GRACE_S):
                    answer = await call()
            failed = False
            _check_storable(answer)
            outcome = _label_of(operation, answer)
        except NeverSent as error:
            outcome, failed = "never_sent", error.is_outage
            raise
        except OutcomeUnknown as error:
            failed = error.is_outage
            logger.bind(operation=operation, reason=str(error)).info("the provider gave no outcome")
            raise
        except TimeoutError as error:
            failed = True
            message = "the gateway exceeded its timeout"
            self._repeats.tell("ERROR", message, of=operation, operation=operation)
            raise OutcomeUnknown("the gateway exceeded its timeout") from error
        except Exception as error:
            failed = False
            what = f"{operation} {type(error).__name__}"
            message = "the gateway failed"
            self._repeats.tell("ERROR", message, of=what, exception=error, operation=operation)
            raise OutcomeUnknown("the gateway failed") from error
        finally:
            self._metrics.calls[operation, outcome].inc()
            self._note(permit, failed)
        if operation in self._metrics.seconds:
            self._metrics.seconds[operation].observe(time.perf_counter() - started)
        return answer

    def _note(self, permit: ProviderPermit, failed: bool | None) -> None:
        """`failed` is None for a call that was cancelled."""
        now = self._clock()
        if failed is None:
            self._breaker.cancelled(permit)
        elif self._breaker.ended(permit, now, failed=failed):
            log = logger.bind(gateway=self.name)
            if self._breaker.is_open:
                log.error("the provider is down: new charges are refused, the rest waits")
            else:
                log.info("the provider is back")


def is_storable(word: str) -> bool:
    """Whether an id of the provider, or a code, can be stored and compared as bytes."""
    return _WORD.fullmatch(word) is not None


def _check_hint(hint: Hint) -> None:
    """What goes into the table of hints."""
    words = [hint.event_id, *([] if hint.reference is None else [hint.reference])]
    if not all(map(is_storable, words)) or not isinstance(hint.payment_id, UUID | None):
        raise ValueError("a hint with an id that cannot be stored")
    if hint.payment_id is None and hint.reference is None:
        raise ValueError("a hint about no payment")


def _label_of(operation: str, answer: Approved | Declined | Open | str | None) -> str:
    label = _OUTCOME_LABELS[type(answer)]
    if label not in GATEWAY_OUTCOMES[operation]:
        raise TypeError(f"{operation} returned {type(answer).__name__}")
    return label


def _check_storable(answer: Approved | Declined | Open | str | None) -> None:
    """What the provider calls things goes into events and text columns."""
    match answer:
        case Approved(provider_txn_id=word) | Declined(code=word) | str(word):
            pass
        case Open(action=action) if action is not None:
            word = action.type
        case _:
            return
    if not is_storable(word):
        raise ValueError(
            "the provider's id or code is not 1 to 255 printable ASCII characters without "
            "quotation marks and backslashes"
        )
