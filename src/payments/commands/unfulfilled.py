"""Give back a payment whose order failed, without being asked to: UNFULFILLED=refund.

At most once per payment: the refund's id is derived from the payment's (payment/identity.py). All
else is as for a refund that a client asks for (refund.py), and settling goes on with one that is
under way. How much goes back in an hour is bounded (brake.py). Why: docs/decisions/giving-back.md.
"""

from uuid import UUID

from loguru import logger

from payments import brake
from payments.admission import Admission
from payments.clients import FULFILMENT
from payments.commands.giving_back import GivingBack
from payments.commands.refund import Refunding, RefundPayment
from payments.database.connections import Database
from payments.errors import PaymentsError
from payments.event_store import LoadedPayment, load_payment
from payments.observability.logs import LogFields
from payments.payment.identity import RefundRequest, unfulfilled_refund_id
from payments.payment.state import Status


class UnfulfilledRefunding:
    """Gives back what its order did not fulfil. One instance per process."""

    def __init__(
        self,
        refunding: Refunding,
        giving_back: GivingBack,
        database: Database,
        admission: Admission,
    ) -> None:
        self._refunding = refunding
        self._giving_back = giving_back
        self._database = database
        self._client = admission.client(FULFILMENT)
        self._stopped = False  # whether this process has told so

    async def give_back(self, payment_id: UUID) -> bool:
        """Whether what was left of the payment went back by this, or is on its way, which settling
        goes on with. If not, it is held back, refused by the provider, or refunded by somebody
        else; asking again finds out, and sends nothing twice.

        Only for a payment whose order is known to have failed.
        """
        with LogFields(payment_id=payment_id):
            try:
                return await self._give_back(payment_id)
            except PaymentsError as error:
                reason = f"{error.code}: {error}"
                logger.bind(reason=reason).info(
                    "no automatic refund now, although the order failed"
                )
                return False

    async def _give_back(self, payment_id: UUID) -> bool:
        loaded = await load_payment(self._database, payment_id)
        if loaded is None:
            return False
        known = loaded.payment.refund(unfulfilled_refund_id(payment_id))
        if known is not None:
            return known.status is not Status.FAILED  # that was told when it was recorded
        if not await self._may_begin(loaded):
            return False
        request = RefundRequest(
            payment_id=payment_id,
            amount_cents=None,
            idempotency_key=None,
            client=FULFILMENT,
            unfulfilled=True,
        )
        self._client.enter()
        try:
            command = RefundPayment(request=request, traceparent=loaded.traceparent)
            await self._refunding.refund(command)
        finally:
            self._client.leave()
        return True

    async def _may_begin(self, loaded: LoadedPayment) -> bool:
        """Whether it can be given back, and the brake lets it; what cannot be does not count."""
        payment = loaded.payment
        if payment.status is not Status.SUCCESS or not payment.remaining_cents:
            return False
        await self._giving_back.check_allowed()
        self._refunding.check_refundable(payment)
        outcome = await brake.begin(self._database, payment.id)
        if outcome != "begun" and not self._stopped:
            logger.error(
                "automatic refunds are stopped, since there were too many: check why the orders "
                "failed, then `payments giving-back resume`"
            )
        self._stopped = outcome != "begun"
        return not self._stopped
