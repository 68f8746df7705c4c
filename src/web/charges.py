"""POST /v1/charge.

A charge's fields have rules that a schema cannot say. None of their messages repeats a value: it
may be a card number.
"""

import re
from datetime import datetime
from uuid import UUID

import msgspec
from litestar import post
from litestar.enums import MediaType

from payments.commands.charge import Charged, ChargePayment
from payments.errors import FieldError
from payments.payment.identity import ChargeRequest
from payments.payment.state import Status
from payments.times import read_time
from web.answer import JsonAnswer, command_answer
from web.requests import (
    TIME_TEXT,
    AnyRequest,
    invalid_fields,
    log_with,
    read_command,
    service_of,
)
from web.schema.description import described
from web.schema.operations.charges import CHARGE, ChargeAnswer, ChargeBody

_CARD_NUMBER = re.compile(r"[0-9]{13,19}")
_DOT = re.compile(r"%2e", re.IGNORECASE)


@post("/charge", status_code=201, media_type=MediaType.JSON, opt=described(CHARGE))
async def charge(request: AnyRequest) -> JsonAnswer:
    """Charge a payment, exactly once per Idempotency-Key."""
    sent = read_command(
        request,
        ChargeBody,
        why_a_key="Send an Idempotency-Key header: a new value for each charge, and the same "
        "value for its retries.",
    )
    body = sent.body
    assert sent.key is not None
    log_with(request, order_id=body.merchant_order_id)
    service = service_of(request)
    _check_payment_method(body.payment_method)
    _check_return_url(body.return_url, service.settings.return_url_prefixes)
    charged = await service.charging.charge(
        ChargePayment(
            request=ChargeRequest(
                idempotency_key=sent.key,
                merchant_order_id=msgspec.convert(body.merchant_order_id, UUID),
                amount_cents=body.amount_cents,
                currency=body.currency.value,
                client=sent.client,
                payment_method=body.payment_method,
            ),
            request_id=sent.request_id,
            traceparent=sent.traceparent,
            hold_until=_read_hold_until(body.hold_until),
            return_url=body.return_url,
        ),
        sent.caller,
    )
    return _answer(request, charged)


def _answer(request: AnyRequest, charged: Charged) -> JsonAnswer:
    payment, action = charged.payment, charged.next_action
    answer = ChargeAnswer(
        id=payment.id,
        merchant_order_id=payment.merchant_order_id,
        provider_txn_id=payment.provider_txn_id,
        # Not the payment's status: a replay after a refund has the body of the first response.
        status=payment.outcome,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
        next_action=msgspec.UNSET if action is None else {"type": action.type, **action.fields},
    )
    pending = answer.status is Status.PENDING
    return command_answer(request, answer, payment.id, pending=pending, replayed=charged.replayed)


def _check_payment_method(payment_method: str | None) -> None:
    """Raises InvalidRequest for what looks like a card number: it would make this service, its logs
    and its backups subject to the rules for card data (PCI DSS)."""
    if payment_method is not None and is_card_number(payment_method):
        raise invalid_fields(
            FieldError(
                "payment_method",
                "looks like a card number: send the token that the provider made of the card, "
                "never the number itself",
            )
        )


def is_card_number(text: str) -> bool:
    """13 to 19 digits, blanks and dashes aside, with the check digit of ISO/IEC 7812 (Luhn)."""
    digits = text.replace(" ", "").replace("-", "")
    if not _CARD_NUMBER.fullmatch(digits):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _check_return_url(return_url: str | None, prefixes: tuple[str, ...]) -> None:
    """Raises InvalidRequest for one that begins with none of the prefixes, also once a browser has
    resolved `..`: the provider sends the customer there."""
    if return_url is None:
        return
    if not prefixes:
        message = "is not accepted: the service has no RETURN_URL_PREFIXES; leave it out"
        raise invalid_fields(FieldError("return_url", message))
    if not return_url.startswith(prefixes) or _has_dot_segment(return_url):
        message = f"must begin with {' or '.join(prefixes)}, without a segment . or .. in its path"
        raise invalid_fields(FieldError("return_url", message))


def _has_dot_segment(url: str) -> bool:
    """As browsers read the path: %2e is a dot there, and a backslash a slash."""
    path = _DOT.sub(".", re.split(r"[?#]", url, maxsplit=1)[0])
    return any(segment in (".", "..") for segment in re.split(r"[/\\]", path))


def _read_hold_until(hold_until: str | None) -> datetime | None:
    if hold_until is None:
        return None
    try:
        return read_time(hold_until)
    except ValueError:  # a 31 February
        raise invalid_fields(FieldError("hold_until", f"must be {TIME_TEXT}")) from None
