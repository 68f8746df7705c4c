"""Sending money back: each refund at most once, and none while the log may lack others."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from functools import partial

from payments import sendings
from payments.database.connections import Database
from payments.errors import DatabaseUnavailable
from payments.events import losses
from payments.events.watch import LogWatch
from payments.gateways import Gateway, NeverSent, OutcomeUnknown, ProviderRefund
from payments.payment.state import Approved, Declined


class GivingBack:
    """Refunds, and late captures that are returned, at the provider."""

    def __init__(self, database: Database, watch: LogWatch) -> None:
        self._database = database
        self._watch = watch

    async def check_allowed(self) -> None:
        """Raises LogRewound while a loss of the log is open, or DatabaseUnavailable."""
        await self._watch.refuse_if_lost()

    async def lost_since(self, moment: datetime) -> bool:
        """Whether the log lost events after this time of the database's clock, as far as it is
        known. Raises DatabaseUnavailable."""
        return await losses.found_since(self._database, moment)

    async def send(
        self, gateway: Gateway, order: ProviderRefund, timeout_s: Callable[[], float]
    ) -> Approved | Declined:
        """Sends a refund that was accepted a moment ago, for the first time.

        `timeout_s` is asked before each call; it may raise to prevent it. Raises LogRewound,
        OutcomeUnknown or NeverSent.
        """
        self._watch.refuse_if_known_lost()
        note = partial(sendings.note_never_sent, self._database, order.refund_id, order.payment_id)
        return await _send(gateway, order, timeout_s, note)

    async def send_again(
        self,
        gateway: Gateway,
        order: ProviderRefund,
        age_s: float,
        timeout_s: Callable[[], float],
        *,
        unsent: bool = False,
    ) -> Approved | Declined:
        """What became of a refund that may have been sent before; sends it again if that is safe.

        `age_s`: how long ago it was accepted, at the most. `unsent`: it was never sent unless a
        note says so. Raises as `send`, DatabaseUnavailable, and OutcomeUnknown also if the provider
        does not know the refund and might make it twice.
        """
        found = await gateway.find_refund(order, timeout_s())
        if found is not None:
            return found
        await self.check_allowed()
        sending = await sendings.begin(
            self._database, order.refund_id, order.payment_id, age_s, unsent=unsent
        )
        if sending.age_s > gateway.refund_retry_s:
            raise OutcomeUnknown("too old for a retry with the same provider key")
        take_back = partial(sendings.take_back, self._database, order.refund_id, sending.number)
        return await _send(gateway, order, timeout_s, take_back if sending.never_before else None)


async def _send(
    gateway: Gateway,
    order: ProviderRefund,
    timeout_s: Callable[[], float],
    note_unsent: Callable[[], Awaitable[None]] | None,
) -> Approved | Declined:
    """`note_unsent` is called if it provably did not arrive."""
    arrived = False
    try:
        left_s = timeout_s()
        arrived = True  # unless the gateway says otherwise
        return await gateway.refund(order, left_s)
    except NeverSent:
        arrived = False
        raise
    finally:
        if not arrived and note_unsent is not None:
            with suppress(DatabaseUnavailable):  # then it counts as sent
                await note_unsent()
