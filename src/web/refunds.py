"""POST /v1/refund."""

from uuid import UUID

import msgspec
from litestar import post
from litestar.enums import MediaType

from payments.commands.refund import Refunded, RefundPayment
from payments.errors import InvalidIdempotencyKey, PaymentNotFound
from payments.payment.identity import RefundRequest
from payments.payment.state import Status
from payments.queries.payments import not_found
from web.answer import JsonAnswer, command_answer
from web.auth import may_read
from web.requests import AnyRequest, log_with, read_command, service_of
from web.schema.description import described
from web.schema.operations.refunds import REFUND, RefundAnswer, RefundBody


@post("/refund", status_code=201, media_type=MediaType.JSON, opt=described(REFUND))
async def refund(request: AnyRequest) -> JsonAnswer:
    """Refund a captured payment, in full or in part."""
    sent = read_command(request, RefundBody)
    body, key = sent.body, sent.key
    log_with(request, payment_id=body.payment_id)
    amount_cents = None if body.amount_cents is msgspec.UNSET else body.amount_cents
    if amount_cents is not None and key is None:
        raise InvalidIdempotencyKey(
            "Send an Idempotency-Key header with amount_cents: without one, a retry would "
            "refund the amount a second time."
        )
    service = service_of(request)
    wanted = RefundRequest(
        payment_id=UUID(body.payment_id),
        amount_cents=amount_cents,
        idempotency_key=key,
        client=sent.client,
    )
    reach = may_read(sent.client)
    try:
        refunded = await service.refunding.refund(
            RefundPayment(
                request=wanted,
                may_read=reach,
                request_id=sent.request_id,
                traceparent=sent.traceparent,
            )
        )
    except PaymentNotFound:
        raise await not_found(service.database, wanted.payment_id, reach) from None
    return _answer(request, refunded)


def _answer(request: AnyRequest, refunded: Refunded) -> JsonAnswer:
    payment, made = refunded.payment, refunded.refund
    pending = made.status is Status.PENDING
    if pending:
        status, refunded_cents = payment.status, payment.refunded_cents
    else:
        # As of this refund, without later ones: a replay has the same body.
        refunded_cents = made.refunded_cents
        whole = refunded_cents == payment.amount_cents
        status = Status.REFUNDED if whole else Status.SUCCESS
    answer = RefundAnswer(
        id=payment.id,
        status=status,
        refund_id=made.id,
        amount_cents=made.amount_cents,
        refunded_cents=refunded_cents,
    )
    return command_answer(request, answer, payment.id, pending=pending, replayed=refunded.replayed)
