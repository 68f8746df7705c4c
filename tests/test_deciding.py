"""Which event comes next: every command in every state, as tables that can be read."""

import itertools
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.errors import (
    IdempotencyKeyReused,
    PaymentNotRefundable,
    PaymentsError,
    RefundExceedsCapture,
)
from payments.events.facts import (
    Fact,
    LateCaptureFound,
    LateCaptureReturned,
    PaymentRefunded,
    RefundInitiated,
    decode,
    encode,
)
from payments.payment.decisions import (
    REFUND_ATTEMPTS_MAX,
    REFUNDS_MAX,
    Cause,
    OutcomeMismatch,
    abandon,
    charge_outcome,
    initiate,
    initiate_refund,
    known_refund,
    referenced,
    refund_outcome,
    require_action,
    return_outcome,
)
from payments.payment.identity import (
    ChargeRequest,
    RefundRequest,
    differing_fields,
    fingerprint,
    is_of_unfulfilled,
    payment_id_for,
    refund_id_for,
    unfulfilled_refund_id,
)
from payments.payment.state import (
    Approved,
    Declined,
    LateCapture,
    Payment,
    Refund,
    Status,
    evolve,
    fold,
)
from tests.payment_states import (
    ABANDONED,
    ACTION,
    CAPTURED_CENTS,
    CHARGED,
    DECLINED,
    FOUND,
    INITIATED,
    LATE,
    ORDER_ID,
    OTHER_ID,
    PAYMENT_ID,
    R1,
    R1_BACK,
    R1_BEGAN,
    R2,
    REFERENCED,
    RETURNED,
    STATES,
    STREAMS,
    T0,
    UNKEYED,
    at,
    began,
    changed,
    given_back,
    payment_after,
    payment_in,
    refused,
)

REQUEST = ChargeRequest(
    idempotency_key="abc123",
    merchant_order_id=ORDER_ID,
    amount_cents=CAPTURED_CENTS,
    currency="INR",
    client="order",
    payment_method="tok_1",
)
# One other value for every part of a request but the key.
OTHER: dict[str, Any] = {
    "merchant_order_id": OTHER_ID,
    "amount_cents": 1501,
    "currency": "USD",
    "client": "someone-else",
    "payment_method": "tok_2",
}


def request_with(**fields: Any) -> ChargeRequest:
    return msgspec.structs.replace(REQUEST, **fields)


def next_cause(payment: Payment | None, client: str = "order") -> Cause:
    """As in the facts of STREAMS."""
    version = payment.version + 1 if payment else 1
    return Cause(
        event_id=UUID(int=version),
        occurred_at=at(version),
        client=client,
        request_id="request-1",
        traceparent="00-" + "a" * 32 + "-1-01",
    )


# The commands, as the first arguments of these functions; the last one is the payment.
Decision = Fact | Refund | None
Command = Callable[[Payment | None], Decision]


def charge(request: ChargeRequest, payment: Payment | None) -> Decision:
    if payment is None:
        return initiate(request, "simulated", next_cause(None))
    if differing := differing_fields(payment, request):
        raise IdempotencyKeyReused(differing)
    return None


def charge_answered(answer: Approved | Declined, payment: Payment | None) -> Decision:
    assert payment is not None
    return charge_outcome(payment, answer, next_cause(payment))


def prepared(reference: str, payment: Payment | None) -> Decision:
    assert payment is not None
    return referenced(payment, reference, next_cause(payment))


def told_to_act(payment: Payment | None) -> Decision:
    assert payment is not None
    return require_action(payment, "redirect", next_cause(payment))


def give_up(payment: Payment | None) -> Decision:
    assert payment is not None
    return abandon(payment, next_cause(payment))


def refund(
    amount_cents: int | None, key: str | None, client: str, payment: Payment | None
) -> Decision:
    assert payment is not None
    request = RefundRequest(
        payment_id=payment.id, amount_cents=amount_cents, idempotency_key=key, client=client
    )
    known = known_refund(payment, request)
    return known or initiate_refund(payment, request, next_cause(payment, client))


def give_back(payment: Payment | None) -> Decision:
    """By itself, since its order failed."""
    assert payment is not None
    request = RefundRequest(
        payment_id=payment.id,
        amount_cents=None,
        idempotency_key=None,
        client="fulfilment",
        unfulfilled=True,
    )
    known = known_refund(payment, request)
    return known or initiate_refund(payment, request, next_cause(payment, "fulfilment"))


def refund_answered(
    answer: dict[str, Any] | Declined, payment: Payment | None, nth: int = -1
) -> Decision:
    """The answer to one of the refunds, the last of them: what is other than was asked for."""
    assert payment is not None
    refunds = payment.refunds or (NEVER_BEGUN,)
    asked = refunds[nth % len(refunds)]
    given = Approved(
        id=asked.id,
        amount_cents=asked.amount_cents,
        currency=payment.currency,
        provider_txn_id="re-1",
    )
    outcome = msgspec.structs.replace(given, **answer) if isinstance(answer, dict) else answer
    return refund_outcome(payment, asked, outcome, next_cause(payment))


def return_answered(answer: Approved | Declined, payment: Payment | None) -> Decision:
    assert payment is not None
    late = payment.late_capture or LATE_CAPTURE
    return return_outcome(payment, late, answer, next_cause(payment))


NEVER_BEGUN = msgspec.structs.replace(payment_in("500 under way").refunds[0], id=OTHER_ID)
LATE_CAPTURE = LateCapture(refund_id=LATE, version=3, found_at=at(3), provider_txn_id="txn-1")
CAPTURE = Approved(
    id=PAYMENT_ID, amount_cents=CAPTURED_CENTS, currency="INR", provider_txn_id="txn-1"
)
NO_FUNDS = Declined("no_funds")
RETURN = Approved(id=LATE, amount_cents=CAPTURED_CENTS, currency="INR", provider_txn_id="re-1")
CLOSED = Declined("account_closed")

# r1 and r2 are the keys of refunds in STREAMS; r9 is new in every state.
COMMANDS: dict[str, Command] = {
    "charge 1500": partial(charge, REQUEST),
    "charge 1501": partial(charge, request_with(amount_cents=1501)),
    "captured": partial(charge_answered, CAPTURE),
    "captured as txn-2": partial(
        charge_answered, msgspec.structs.replace(CAPTURE, provider_txn_id="txn-2")
    ),
    "captured 1499": partial(charge_answered, msgspec.structs.replace(CAPTURE, amount_cents=1499)),
    "captured USD": partial(charge_answered, msgspec.structs.replace(CAPTURE, currency="USD")),
    "captured another": partial(charge_answered, msgspec.structs.replace(CAPTURE, id=OTHER_ID)),
    "declined": partial(charge_answered, NO_FUNDS),
    "prepared": partial(prepared, "pi_1"),
    "prepared as pi_2": partial(prepared, "pi_2"),
    "action": told_to_act,
    "abandon": give_up,
    "refund": partial(refund, None, None, "order"),
    "r9: refund": partial(refund, None, "r9", "order"),
    "r9: refund 400": partial(refund, 400, "r9", "order"),
    "r9: refund 1001": partial(refund, 1001, "r9", "order"),
    "r9: refund 1501": partial(refund, 1501, "r9", "order"),
    "r1: refund": partial(refund, None, "r1", "order"),
    "r1: refund 500": partial(refund, 500, "r1", "order"),
    "r1: refund 501": partial(refund, 501, "r1", "order"),
    "r1, another client: 500": partial(refund, 500, "r1", "someone-else"),
    "given back": partial(refund_answered, {}),
    "given back as re-2": partial(refund_answered, {"provider_txn_id": "re-2"}),
    "given back 1": partial(refund_answered, {"amount_cents": 1}),
    "given back USD": partial(refund_answered, {"currency": "USD"}),
    "given back another": partial(refund_answered, {"id": PAYMENT_ID}),
    "refused": partial(refund_answered, CLOSED),
    "returned": partial(return_answered, RETURN),
    "returned as re-2": partial(
        return_answered, msgspec.structs.replace(RETURN, provider_txn_id="re-2")
    ),
    "returned 1499": partial(return_answered, msgspec.structs.replace(RETURN, amount_cents=1499)),
    "returned USD": partial(return_answered, msgspec.structs.replace(RETURN, currency="USD")),
    "returned another": partial(return_answered, msgspec.structs.replace(RETURN, id=PAYMENT_ID)),
    "not returned": partial(return_answered, CLOSED),
}


# Every state (tests/test_payment.py has the events that lead there) and every command. A cell is
#   the event that is decided, with its amount; after it in a PaymentRefunded what is back in all,
#   "-"              nothing new: no event,
#   "the known one"  the refund that an earlier request began,
#   the error        that says why there is no event, or
#   "never asked"    there is no payment to ask about.
TABLES = """
A charge, and what its client and settling ask later.

state                 | charge 1500           | charge 1501           | abandon
none                  | PaymentInitiated 1500 | PaymentInitiated 1501 | never asked
PENDING               | -                     | IdempotencyKeyReused  | PaymentFailed 1500
referenced            | -                     | IdempotencyKeyReused  | PaymentFailed 1500
to act                | -                     | IdempotencyKeyReused  | PaymentFailed 1500
referenced, to act    | -                     | IdempotencyKeyReused  | PaymentFailed 1500
SUCCESS               | -                     | IdempotencyKeyReused  | -
500 under way         | -                     | IdempotencyKeyReused  | -
all under way         | -                     | IdempotencyKeyReused  | -
500 back              | -                     | IdempotencyKeyReused  | -
500 back, 300 going   | -                     | IdempotencyKeyReused  | -
300 back, 500 refused | -                     | IdempotencyKeyReused  | -
REFUNDED at once      | -                     | IdempotencyKeyReused  | -
REFUNDED in parts     | -                     | IdempotencyKeyReused  | -
FAILED declined       | -                     | IdempotencyKeyReused  | -
FAILED abandoned      | -                     | IdempotencyKeyReused  | -
late capture found    | -                     | IdempotencyKeyReused  | -
late capture returned | -                     | IdempotencyKeyReused  | -

What the provider says became of the charge.

state                 | captured              | captured as txn-2     | declined
none                  | never asked           | never asked           | never asked
PENDING               | PaymentCharged 1500   | PaymentCharged 1500   | PaymentFailed 1500
referenced            | PaymentCharged 1500   | PaymentCharged 1500   | PaymentFailed 1500
to act                | PaymentCharged 1500   | PaymentCharged 1500   | PaymentFailed 1500
referenced, to act    | PaymentCharged 1500   | PaymentCharged 1500   | PaymentFailed 1500
SUCCESS               | -                     | OutcomeMismatch       | OutcomeMismatch
500 under way         | -                     | OutcomeMismatch       | OutcomeMismatch
all under way         | -                     | OutcomeMismatch       | OutcomeMismatch
500 back              | -                     | OutcomeMismatch       | OutcomeMismatch
500 back, 300 going   | -                     | OutcomeMismatch       | OutcomeMismatch
300 back, 500 refused | -                     | OutcomeMismatch       | OutcomeMismatch
REFUNDED at once      | -                     | OutcomeMismatch       | OutcomeMismatch
REFUNDED in parts     | -                     | OutcomeMismatch       | OutcomeMismatch
FAILED declined       | LateCaptureFound 1500 | LateCaptureFound 1500 | -
FAILED abandoned      | LateCaptureFound 1500 | LateCaptureFound 1500 | -
late capture found    | -                     | OutcomeMismatch       | -
late capture returned | -                     | OutcomeMismatch       | -

What the provider gave the charge when it prepared it, and that its customer has to act.

state                 | prepared               | prepared as pi_2       | action
none                  | never asked            | never asked            | never asked
PENDING               | PaymentReferenced 1500 | PaymentReferenced 1500 | PaymentActionRequired 1500
referenced            | -                      | OutcomeMismatch        | PaymentActionRequired 1500
to act                | PaymentReferenced 1500 | PaymentReferenced 1500 | -
referenced, to act    | -                      | OutcomeMismatch        | -
SUCCESS               | -                      | -                      | -
500 under way         | -                      | -                      | -
all under way         | -                      | -                      | -
500 back              | -                      | -                      | -
500 back, 300 going   | -                      | -                      | -
300 back, 500 refused | -                      | -                      | -
REFUNDED at once      | -                      | -                      | -
REFUNDED in parts     | -                      | -                      | -
FAILED declined       | -                      | -                      | -
FAILED abandoned      | -                      | -                      | -
late capture found    | -                      | -                      | -
late capture returned | -                      | -                      | -

An answer about another charge is no answer.

state                 | captured 1499   | captured USD    | captured another
none                  | never asked     | never asked     | never asked
PENDING               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced            | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
to act                | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced, to act    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
SUCCESS               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
all under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back              | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back, 300 going   | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
300 back, 500 refused | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED at once      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED in parts     | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED declined       | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED abandoned      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture found    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture returned | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch

A new refund, of whatever is left.

state                 | refund                 | r9: refund
none                  | never asked            | never asked
PENDING               | PaymentNotRefundable   | PaymentNotRefundable
referenced            | PaymentNotRefundable   | PaymentNotRefundable
to act                | PaymentNotRefundable   | PaymentNotRefundable
referenced, to act    | PaymentNotRefundable   | PaymentNotRefundable
SUCCESS               | RefundInitiated 1500   | RefundInitiated 1500
500 under way         | RefundInitiated 1000   | RefundInitiated 1000
all under way         | the known one          | RefundExceedsCapture
500 back              | RefundInitiated 1000   | RefundInitiated 1000
500 back, 300 going   | RefundInitiated 700    | RefundInitiated 700
300 back, 500 refused | RefundInitiated 1200   | RefundInitiated 1200
REFUNDED at once      | PaymentAlreadyRefunded | PaymentAlreadyRefunded
REFUNDED in parts     | PaymentAlreadyRefunded | PaymentAlreadyRefunded
FAILED declined       | PaymentNotRefundable   | PaymentNotRefundable
FAILED abandoned      | PaymentNotRefundable   | PaymentNotRefundable
late capture found    | PaymentNotRefundable   | PaymentNotRefundable
late capture returned | PaymentNotRefundable   | PaymentNotRefundable

A new refund of an amount.

state                 | r9: refund 400         | r9: refund 1001        | r9: refund 1501
none                  | never asked            | never asked            | never asked
PENDING               | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
referenced            | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
to act                | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
referenced, to act    | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
SUCCESS               | RefundInitiated 400    | RefundInitiated 1001   | RefundExceedsCapture
500 under way         | RefundInitiated 400    | RefundExceedsCapture   | RefundExceedsCapture
all under way         | RefundExceedsCapture   | RefundExceedsCapture   | RefundExceedsCapture
500 back              | RefundInitiated 400    | RefundExceedsCapture   | RefundExceedsCapture
500 back, 300 going   | RefundInitiated 400    | RefundExceedsCapture   | RefundExceedsCapture
300 back, 500 refused | RefundInitiated 400    | RefundInitiated 1001   | RefundExceedsCapture
REFUNDED at once      | PaymentAlreadyRefunded | PaymentAlreadyRefunded | PaymentAlreadyRefunded
REFUNDED in parts     | PaymentAlreadyRefunded | PaymentAlreadyRefunded | PaymentAlreadyRefunded
FAILED declined       | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
FAILED abandoned      | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
late capture found    | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable
late capture returned | PaymentNotRefundable   | PaymentNotRefundable   | PaymentNotRefundable

The same key again. It was used for 500 by `order`; in "REFUNDED at once" for whatever was left.

state                 | r1: refund 500       | r1: refund 501
none                  | never asked          | never asked
PENDING               | PaymentNotRefundable | PaymentNotRefundable
referenced            | PaymentNotRefundable | PaymentNotRefundable
to act                | PaymentNotRefundable | PaymentNotRefundable
referenced, to act    | PaymentNotRefundable | PaymentNotRefundable
SUCCESS               | RefundInitiated 500  | RefundInitiated 501
500 under way         | the known one        | IdempotencyKeyReused
all under way         | RefundExceedsCapture | RefundExceedsCapture
500 back              | the known one        | IdempotencyKeyReused
500 back, 300 going   | the known one        | IdempotencyKeyReused
300 back, 500 refused | the known one        | IdempotencyKeyReused
REFUNDED at once      | IdempotencyKeyReused | IdempotencyKeyReused
REFUNDED in parts     | the known one        | IdempotencyKeyReused
FAILED declined       | PaymentNotRefundable | PaymentNotRefundable
FAILED abandoned      | PaymentNotRefundable | PaymentNotRefundable
late capture found    | PaymentNotRefundable | PaymentNotRefundable
late capture returned | PaymentNotRefundable | PaymentNotRefundable

state                 | r1: refund           | r1, another client: 500
none                  | never asked          | never asked
PENDING               | PaymentNotRefundable | PaymentNotRefundable
referenced            | PaymentNotRefundable | PaymentNotRefundable
to act                | PaymentNotRefundable | PaymentNotRefundable
referenced, to act    | PaymentNotRefundable | PaymentNotRefundable
SUCCESS               | RefundInitiated 1500 | RefundInitiated 500
500 under way         | IdempotencyKeyReused | IdempotencyKeyReused
all under way         | RefundExceedsCapture | RefundExceedsCapture
500 back              | IdempotencyKeyReused | IdempotencyKeyReused
500 back, 300 going   | IdempotencyKeyReused | IdempotencyKeyReused
300 back, 500 refused | IdempotencyKeyReused | IdempotencyKeyReused
REFUNDED at once      | the known one        | IdempotencyKeyReused
REFUNDED in parts     | IdempotencyKeyReused | IdempotencyKeyReused
FAILED declined       | PaymentNotRefundable | PaymentNotRefundable
FAILED abandoned      | PaymentNotRefundable | PaymentNotRefundable
late capture found    | PaymentNotRefundable | PaymentNotRefundable
late capture returned | PaymentNotRefundable | PaymentNotRefundable

What the provider says became of the last refund. One that the log lost is reserved again, if there
is room for it.

state                 | given back                | given back as re-2        | refused
none                  | never asked               | never asked               | never asked
PENDING               | OutcomeMismatch           | OutcomeMismatch           | -
referenced            | OutcomeMismatch           | OutcomeMismatch           | -
to act                | OutcomeMismatch           | OutcomeMismatch           | -
referenced, to act    | OutcomeMismatch           | OutcomeMismatch           | -
SUCCESS               | RefundInitiated 500       | RefundInitiated 500       | -
500 under way         | PaymentRefunded 500 500   | PaymentRefunded 500 500   | RefundFailed 500
all under way         | PaymentRefunded 1500 1500 | PaymentRefunded 1500 1500 | RefundFailed 1500
500 back              | -                         | OutcomeMismatch           | OutcomeMismatch
500 back, 300 going   | PaymentRefunded 300 800   | PaymentRefunded 300 800   | RefundFailed 300
300 back, 500 refused | OutcomeMismatch           | OutcomeMismatch           | -
REFUNDED at once      | -                         | OutcomeMismatch           | OutcomeMismatch
REFUNDED in parts     | -                         | OutcomeMismatch           | OutcomeMismatch
FAILED declined       | OutcomeMismatch           | OutcomeMismatch           | -
FAILED abandoned      | OutcomeMismatch           | OutcomeMismatch           | -
late capture found    | OutcomeMismatch           | OutcomeMismatch           | -
late capture returned | OutcomeMismatch           | OutcomeMismatch           | -

An answer about another refund is no answer.

state                 | given back 1    | given back USD  | given back another
none                  | never asked     | never asked     | never asked
PENDING               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced            | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
to act                | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced, to act    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
SUCCESS               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
all under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back              | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back, 300 going   | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
300 back, 500 refused | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED at once      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED in parts     | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED declined       | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED abandoned      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture found    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture returned | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch

What the provider says became of sending a late capture back. One that the log lost is found again.

state                 | returned                 | returned as re-2         | not returned
none                  | never asked              | never asked              | never asked
PENDING               | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
referenced            | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
to act                | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
referenced, to act    | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
SUCCESS               | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
500 under way         | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
all under way         | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
500 back              | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
500 back, 300 going   | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
300 back, 500 refused | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
REFUNDED at once      | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
REFUNDED in parts     | OutcomeMismatch          | OutcomeMismatch          | OutcomeMismatch
FAILED declined       | LateCaptureFound 1500    | LateCaptureFound 1500    | OutcomeMismatch
FAILED abandoned      | LateCaptureFound 1500    | LateCaptureFound 1500    | OutcomeMismatch
late capture found    | LateCaptureReturned 1500 | LateCaptureReturned 1500 | OutcomeMismatch
late capture returned | -                        | OutcomeMismatch          | OutcomeMismatch

state                 | returned 1499   | returned USD    | returned another
none                  | never asked     | never asked     | never asked
PENDING               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced            | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
to act                | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
referenced, to act    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
SUCCESS               | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
all under way         | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back              | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
500 back, 300 going   | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
300 back, 500 refused | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED at once      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
REFUNDED in parts     | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED declined       | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
FAILED abandoned      | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture found    | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
late capture returned | OutcomeMismatch | OutcomeMismatch | OutcomeMismatch
"""


def cells(tables: str) -> dict[tuple[str, str], str]:
    """What each (state, command) comes to."""
    found: dict[tuple[str, str], str] = {}
    commands: list[str] = []
    for line in tables.splitlines():
        state, *row = (cell.strip() for cell in line.split("|"))
        if state == "state":
            commands = row
        elif row:
            for command, cell in zip(commands, row, strict=True):
                assert (state, command) not in found, f"stated twice: {state}, {command}"
                found[state, command] = cell
    return found


TABLE = cells(TABLES)
# What the log lost is appended again, and what the provider says follows.
RESTORED = {
    *itertools.product(["SUCCESS"], ["given back", "given back as re-2"]),
    *itertools.product(["FAILED declined", "FAILED abandoned"], ["returned", "returned as re-2"]),
}
EVENTS = [
    pair
    for pair, cell in TABLE.items()
    if cell.startswith(("Payment", "Refund", "LateCapture")) and cell[-1].isdigit()
]


def decided(command: Command, payment: Payment | None) -> Decision | str:
    """What the command decides, or in words why it decides nothing."""
    try:
        return command(payment)
    except (PaymentsError, OutcomeMismatch) as error:
        return type(error).__name__
    except AssertionError:
        return "never asked"


def told(decision: Decision | str) -> str:
    """A decision as the tables put it."""
    match decision:
        case None:
            return "-"
        case Refund():
            return "the known one"
        case PaymentRefunded():
            return f"PaymentRefunded {decision.amount_cents} {decision.refunded_cents}"
        case Fact():
            return f"{decision.TOPIC} {getattr(decision, 'amount_cents', '')}"
        case words:
            return words


class TestTables:
    def test_they_hold_every_command_in_every_state(self) -> None:
        assert set(TABLE) == set(itertools.product(STREAMS, COMMANDS))

    @pytest.mark.parametrize(
        ("state", "command"),
        TABLE,
    )
    def test_every_command_in_every_state(self, state: str, command: str) -> None:
        payment = fold(STREAMS[state])
        assert told(decided(COMMANDS[command], payment)) == TABLE[state, command]

    @pytest.mark.parametrize(("state", "command"), EVENTS)
    def test_what_is_decided_may_stand_there(self, state: str, command: str) -> None:
        payment = fold(STREAMS[state])
        event = COMMANDS[command](payment)
        assert isinstance(event, Fact)
        after = evolve(payment, event)
        assert after.version == event.version == len(STREAMS[state]) + 1
        cause = next_cause(payment, event.client)
        for name in Cause.__struct_fields__:
            assert getattr(event, name) == getattr(cause, name)

    @pytest.mark.parametrize(("state", "command"), EVENTS)
    def test_what_was_decided_is_not_decided_twice(self, state: str, command: str) -> None:
        payment = fold(STREAMS[state])
        event = COMMANDS[command](payment)
        assert isinstance(event, Fact)
        after = evolve(payment, event)
        again = COMMANDS[command](after)
        if (state, command) in RESTORED:
            assert isinstance(again, PaymentRefunded | LateCaptureReturned)
            again = COMMANDS[command](evolve(after, again))
        assert again is None or (isinstance(again, Refund) and again.version == event.version)


@pytest.mark.parametrize(
    ("state", "command", "event"),
    [
        ("none", "charge 1500", INITIATED),
        ("PENDING", "prepared", REFERENCED),
        ("PENDING", "action", ACTION),
        ("PENDING", "captured", CHARGED),
        ("PENDING", "declined", DECLINED),
        ("PENDING", "abandon", ABANDONED),
        ("FAILED declined", "captured", FOUND),
        ("FAILED abandoned", "captured", FOUND),
        ("late capture found", "returned", RETURNED),
        ("SUCCESS", "r1: refund 500", R1_BEGAN),
        ("SUCCESS", "r1: refund", began(3, R1, 1500, whole=True)),
        ("SUCCESS", "refund", began(3, UUID(int=3), 1500, whole=True)),  # its event's id
        ("500 under way", "given back", R1_BACK),
        ("500 under way", "refused", refused(4, R1, 500)),
        ("500 back, 300 going", "given back", given_back(6, R2, 300, 800)),
        ("all under way", "given back", given_back(4, UNKEYED, 1500, 1500)),
    ],
)
def test_an_event_in_full(state: str, command: str, event: Fact) -> None:
    assert COMMANDS[command](fold(STREAMS[state])) == event


class TestPaymentId:
    @pytest.mark.parametrize(
        ("key", "payment_id"),
        [
            ("abc123", "058c9593-e150-402f-ab5b-37dd4c9816f0"),
            ("order-1-pay", "8547688f-377d-4974-9296-f22dca7975c5"),
            ("0" * 255, "cb98bdd0-11b8-43db-9561-acf1f51d350b"),
        ],
    )
    def test_a_key_means_the_same_payment_for_ever(self, key: str, payment_id: str) -> None:
        assert payment_id_for(key) == UUID(payment_id)

    @given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=255))
    def test_it_is_a_version_4_uuid(self, key: str) -> None:
        payment_id = payment_id_for(key)
        assert payment_id.version == 4
        assert payment_id.variant == uuid.RFC_4122
        assert payment_id == payment_id_for(key)

    @given(st.text(max_size=20), st.text(max_size=20))
    def test_two_keys_mean_two_payments(self, one: str, other: str) -> None:
        assert (payment_id_for(one) == payment_id_for(other)) is (one == other)


class TestRefundId:
    @pytest.mark.parametrize(
        ("payment_id", "key", "refund_id"),
        [
            (PAYMENT_ID, "r1", "f8827278-9918-4c25-a226-83d3043fb3d9"),
            (PAYMENT_ID, "r2", "afacf3ab-0d98-4539-a164-910ca329b36d"),
            (PAYMENT_ID, "0" * 255, "72c10f18-c4f4-4d44-84a0-33a4206d8b6a"),
        ],
    )
    def test_a_key_means_the_same_refund_for_ever(
        self, payment_id: UUID, key: str, refund_id: str
    ) -> None:
        assert refund_id_for(payment_id, key) == UUID(refund_id)

    @given(st.text(max_size=20))
    def test_it_is_a_version_4_uuid_and_no_payments(self, key: str) -> None:
        refund_id = refund_id_for(PAYMENT_ID, key)
        assert (refund_id.version, refund_id.variant) == (4, uuid.RFC_4122)
        assert refund_id != payment_id_for(key)

    @given(st.text(max_size=20), st.text(max_size=20))
    def test_two_keys_mean_two_refunds(self, one: str, other: str) -> None:
        ids = refund_id_for(PAYMENT_ID, one), refund_id_for(PAYMENT_ID, other)
        assert (ids[0] == ids[1]) is (one == other)

    @given(st.text(max_size=20))
    def test_a_key_counts_within_its_payment(self, key: str) -> None:
        assert refund_id_for(PAYMENT_ID, key) != refund_id_for(OTHER_ID, key)


class TestFingerprint:
    def test_it_is_pinned(self) -> None:
        """It is stored: a change would turn every replay of an old key into a 422."""
        assert (
            fingerprint(REQUEST)
            == "aca6776269074565b9d8c8676dbdccb86bff9aa57bc7600de6dc98e9989d323c"
        )

    def test_equal_requests_have_equal_ones(self) -> None:
        assert fingerprint(REQUEST) == fingerprint(request_with())

    def test_the_key_is_no_part_of_it(self) -> None:
        assert fingerprint(REQUEST) == fingerprint(request_with(idempotency_key="other"))

    @pytest.mark.parametrize("field", OTHER)
    def test_every_other_field_is(self, field: str) -> None:
        assert fingerprint(REQUEST) != fingerprint(request_with(**{field: OTHER[field]}))

    def test_no_payment_method_differs_from_any(self) -> None:
        without = request_with(payment_method=None)
        assert len({fingerprint(without), fingerprint(REQUEST)}) == 2
        assert fingerprint(without) != fingerprint(request_with(payment_method=""))
        assert fingerprint(without) != fingerprint(request_with(payment_method="null"))

    def test_the_other_values_cover_every_field(self) -> None:
        assert {*OTHER, "idempotency_key"} == set(ChargeRequest.__struct_fields__)


class TestDifferingFields:
    @pytest.mark.parametrize("state", STATES)
    def test_none_for_the_same_request(self, state: str) -> None:
        assert differing_fields(payment_in(state), REQUEST) == ()

    @pytest.mark.parametrize("field", OTHER)
    def test_each_field_is_named(self, field: str) -> None:
        other = request_with(**{field: OTHER[field]})
        assert differing_fields(payment_in("PENDING"), other) == (field,)

    def test_a_payment_method_that_comes_or_goes_is_named(self) -> None:
        without = request_with(payment_method=None)
        began_without = payment_after([initiate(without, "simulated", next_cause(None))])
        assert differing_fields(payment_in("PENDING"), without) == ("payment_method",)
        assert differing_fields(began_without, REQUEST) == ("payment_method",)

    def test_all_stored_fields_that_differ_are_named(self) -> None:
        other = request_with(**OTHER | {"client": REQUEST.client})
        assert differing_fields(payment_in("PENDING"), other) == (
            "merchant_order_id",
            "amount_cents",
            "currency",
        )

    @pytest.mark.parametrize("state", STATES)
    def test_another_client_is_told_of_nothing_else(self, state: str) -> None:
        fields = [name for name in OTHER if name != "client"]
        for count in range(len(fields) + 1):
            for guessed_wrong in itertools.combinations(fields, count):
                other = {name: OTHER[name] for name in ("client", *guessed_wrong)}
                assert differing_fields(payment_in(state), request_with(**other)) == ("client",)

    @pytest.mark.parametrize("alike", [0, 8, 32, 63])
    def test_the_whole_fingerprint_counts(self, alike: int) -> None:
        payment = payment_in("PENDING")
        other = "".join("0" if digit != "0" else "1" for digit in payment.fingerprint[alike:])
        damaged = msgspec.structs.replace(payment, fingerprint=payment.fingerprint[:alike] + other)
        assert differing_fields(damaged, REQUEST) == ("payment_method",)


def test_a_reference_that_the_payment_method_names_is_stored_with_the_intent() -> None:
    intent = initiate(REQUEST, "simulated", next_cause(None), provider_reference="pay_1")
    assert intent == changed(INITIATED, provider_reference="pay_1")
    assert b"provider_reference" not in encode(initiate(REQUEST, "simulated", next_cause(None)))


def test_one_that_was_supplied_is_not_prepared_under_another() -> None:
    payment = payment_after([changed(INITIATED, provider_reference="pay_1")])
    assert referenced(payment, "pay_1", next_cause(payment)) is None
    with pytest.raises(OutcomeMismatch):
        referenced(payment, "pi_1", next_cause(payment))


def test_the_payment_method_is_not_stored() -> None:
    assert b"tok_1" not in encode(initiate(REQUEST, "simulated", next_cause(None)))


class TestRecordOutcome:
    def test_another_spelling_of_the_currency_is_another_currency(self) -> None:
        answer = msgspec.structs.replace(CAPTURE, currency="inr")
        with pytest.raises(OutcomeMismatch):
            charge_outcome(payment_in("PENDING"), answer, next_cause(None))

    @pytest.mark.parametrize("state", ["FAILED declined", "FAILED abandoned"])
    def test_another_word_for_a_decline_is_nothing_new(self, state: str) -> None:
        answer = Declined("another word for it")
        assert charge_outcome(payment_in(state), answer, next_cause(None)) is None


def asks(amount_cents: int | None, key: str | None, client: str = "order") -> RefundRequest:
    return RefundRequest(
        payment_id=PAYMENT_ID, amount_cents=amount_cents, idempotency_key=key, client=client
    )


class TestKnownRefund:
    def test_it_is_the_one_of_the_key(self) -> None:
        payment = payment_in("REFUNDED in parts")
        assert known_refund(payment, asks(500, "r1")) == payment.refund(R1)
        assert known_refund(payment, asks(300, "r2")) == payment.refund(R2)
        assert known_refund(payment, asks(300, "r9")) is None

    def test_whatever_was_left_may_be_named_by_its_amount(self) -> None:
        payment = payment_in("REFUNDED at once")
        assert known_refund(payment, asks(1500, "r1")) == payment.refund(R1)

    @pytest.mark.parametrize(
        ("request_", "differing"),
        [
            (asks(501, "r1"), ["amount_cents"]),
            (asks(None, "r1"), ["amount_cents"]),
            (asks(500, "r1", "someone-else"), ["client"]),
            (asks(501, "r1", "someone-else"), ["client"]),
            (asks(None, "r1", "someone-else"), ["client"]),
        ],
    )
    def test_what_differs_is_named(self, request_: RefundRequest, differing: list[str]) -> None:
        with pytest.raises(IdempotencyKeyReused) as caught:
            known_refund(payment_in("500 back"), request_)
        assert [error.field for error in caught.value.errors] == differing

    def test_without_a_key_it_is_the_one_under_way_whoever_asked_for_it(self) -> None:
        payment = payment_in("all under way")
        assert known_refund(payment, asks(None, None, "staff")) == payment.refund(UNKEYED)

    @pytest.mark.parametrize("state", ["500 under way", "500 back, 300 going"])
    def test_one_with_a_key_is_never_meant_by_a_request_without(self, state: str) -> None:
        assert known_refund(payment_in(state), asks(None, None)) is None

    def test_one_that_ended_is_not_meant_by_a_request_without_a_key(self) -> None:
        under_way = STREAMS["all under way"]
        refused_ = payment_after([*under_way, refused(4, UNKEYED, 1500)])
        made = payment_after([*under_way, given_back(4, UNKEYED, 1500, 1500)])
        assert known_refund(refused_, asks(None, None)) is None
        assert known_refund(made, asks(None, None)) is None
        again = initiate_refund(refused_, asks(None, None), next_cause(refused_))
        assert (again.amount_cents, again.refund_id) == (1500, UUID(int=5))


class TestInitiateRefund:
    @pytest.mark.parametrize(
        "state", [state for state in STATES if payment_in(state).remaining_cents]
    )
    def test_exactly_what_is_left_may_be_asked_for(self, state: str) -> None:
        payment = payment_in(state)
        left = payment.remaining_cents
        event = initiate_refund(payment, asks(left, "r9"), next_cause(payment))
        assert (event.amount_cents, event.whole) == (left, False)
        assert evolve(payment, event).remaining_cents == 0
        with pytest.raises(RefundExceedsCapture):
            initiate_refund(payment, asks(left + 1, "r9"), next_cause(payment))

    @pytest.mark.parametrize("key", [None, "r9"])
    def test_no_amount_is_whatever_is_left(self, key: str | None) -> None:
        payment = payment_in("500 back, 300 going")
        event = initiate_refund(payment, asks(None, key), next_cause(payment))
        assert (event.amount_cents, event.whole) == (700, True)

    def test_it_belongs_to_the_order_and_the_one_who_asks(self) -> None:
        payment = payment_in("SUCCESS")
        event = initiate_refund(payment, asks(400, "r9", "staff"), next_cause(payment, "staff"))
        assert (event.merchant_order_id, event.currency, event.client) == (ORDER_ID, "INR", "staff")

    @pytest.mark.parametrize(
        ("state", "detail"),
        [
            ("SUCCESS", "Of 1500 captured, 0 are refunded: at most 1500 can be refunded."),
            (
                "all under way",
                "Of 1500 captured, 0 are refunded and 1500 are being refunded: "
                "at most 0 can be refunded.",
            ),
            (
                "500 back, 300 going",
                "Of 1500 captured, 500 are refunded and 300 are being refunded: "
                "at most 700 can be refunded.",
            ),
            (
                "300 back, 500 refused",
                "Of 1500 captured, 300 are refunded: at most 1200 can be refunded.",
            ),
        ],
    )
    def test_a_refusal_says_how_much_is_left(self, state: str, detail: str) -> None:
        payment = payment_in(state)
        with pytest.raises(RefundExceedsCapture) as caught:
            initiate_refund(payment, asks(1501, "r9"), next_cause(payment))
        assert str(caught.value) == detail

    @pytest.mark.parametrize(
        ("state", "status"), [("PENDING", "PENDING"), ("late capture found", "FAILED")]
    )
    def test_a_refusal_names_the_status(self, state: str, status: str) -> None:
        payment = payment_in(state)
        with pytest.raises(PaymentNotRefundable, match=f"payment is {status};"):
            initiate_refund(payment, asks(None, None), next_cause(payment))

    @pytest.mark.parametrize(
        "amount_cents",
        [
            0,
            -1,
        ],
    )
    def test_a_refund_is_never_of_nothing_or_less(self, amount_cents: int) -> None:
        payment = payment_in("SUCCESS")
        with pytest.raises(RefundExceedsCapture):
            initiate_refund(payment, asks(amount_cents, "r9"), next_cause(payment))


class TestGivingBackUnfulfilled:
    @pytest.mark.parametrize("state", STATES)
    def test_it_is_one_refund_of_what_is_left(self, state: str) -> None:
        payment = payment_in(state)
        event = decided(give_back, payment)
        if not payment.remaining_cents:
            assert event in (
                *("PaymentNotRefundable", "PaymentAlreadyRefunded", "RefundExceedsCapture"),
            )
            return
        assert isinstance(event, RefundInitiated)
        assert (event.amount_cents, event.whole) == (payment.remaining_cents, True)
        assert (event.idempotency_key, event.client) == (None, "fulfilment")
        assert is_of_unfulfilled(payment.id, event.refund_id)
        begun = evolve(payment, event)
        assert decided(give_back, begun) == begun.refunds[-1]
        answers: list[dict[str, Any] | Declined] = [{}, CLOSED]
        for answer in answers:
            outcome = decided(partial(refund_answered, answer), begun)
            assert isinstance(outcome, Fact)
            ended = evolve(begun, outcome)
            assert decided(give_back, ended) == ended.refunds[-1]

    def test_its_id_is_its_own_and_the_same_for_ever(self) -> None:
        payment_id = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
        id = unfulfilled_refund_id(payment_id)
        assert id == UUID("ef2c6c03-6f48-48fe-8af5-3f29e6356038")
        assert id.version == 4
        assert is_of_unfulfilled(payment_id, id)
        assert not is_of_unfulfilled(UUID(int=1), id)
        assert not is_of_unfulfilled(payment_id, refund_id_for(payment_id, ""))
        late = charge_outcome(payment_in("FAILED abandoned"), CAPTURE, next_cause(None))
        assert isinstance(late, LateCaptureFound)
        assert not is_of_unfulfilled(late.payment_id, late.refund_id)

    def test_a_client_without_a_key_means_it_while_it_is_under_way(self) -> None:
        payment = payment_in("SUCCESS")
        event = decided(give_back, payment)
        assert isinstance(event, RefundInitiated)
        begun = evolve(payment, event)
        assert known_refund(begun, asks(None, None)) == begun.refunds[-1]


class TestRecordRefund:
    def test_only_the_refund_that_is_meant_ends(self) -> None:
        payment = payment_after([*STREAMS["500 under way"], began(4, R2, 300)])
        first, second = payment.refunds
        answer = Approved(id=second.id, amount_cents=300, currency="INR", provider_txn_id="re-1")
        assert refund_outcome(payment, second, answer, next_cause(payment)) == given_back(
            5, R2, 300, 300
        )
        with pytest.raises(OutcomeMismatch):
            refund_outcome(payment, first, answer, next_cause(payment))

    def test_the_last_part_makes_the_whole(self) -> None:
        """Whichever began first; the totals are those of the moment."""
        payment = payment_after(STREAMS["REFUNDED in parts"][:-1])
        event = COMMANDS["given back"](payment)
        assert event == given_back(8, UNKEYED, 700, 1500)
        assert evolve(payment, given_back(8, UNKEYED, 700, 1500)).status is Status.REFUNDED

    def test_a_refund_as_it_was_before_is_judged_as_it_is_now(self) -> None:
        """The answer may come when another process has recorded it."""
        as_it_was = payment_in("500 under way").refunds[0]
        payment = payment_in("500 back")
        answer = Approved(id=R1, amount_cents=500, currency="INR", provider_txn_id="re-1")
        assert refund_outcome(payment, as_it_was, answer, next_cause(payment)) is None


# Any command with any amounts, about any of the refunds.
commands: st.SearchStrategy[Command] = st.one_of(
    st.sampled_from(list(COMMANDS.values())),
    st.builds(
        partial,
        st.just(refund),
        st.none() | st.integers(1, CAPTURED_CENTS + 1),
        st.sampled_from(["r1", "r2", "r3", "r4", "r5"]),
        st.sampled_from(["order", "staff"]),
    ),
    st.just(give_back),
    st.builds(
        partial,
        st.just(refund_answered),
        st.sampled_from([{}, {}, {"provider_txn_id": "re-2"}, CLOSED]),
        nth=st.integers(0, 4),
    ),
)
# How far the clock of the process that decides is ahead, or behind.
clocks = st.integers(-3600, 3600).map(lambda seconds: timedelta(seconds=seconds))


@given(
    st.sampled_from(list(STREAMS.values())),
    st.lists(st.tuples(commands, clocks), max_size=12),
    st.integers(0, 20),
)
@settings(max_examples=300)
def test_whatever_is_asked_the_money_adds_up(
    begin: list[Fact], steps: list[tuple[Command, timedelta]], cut: int
) -> None:
    """Every event that is decided may stand, and refunds never exceed the capture."""
    facts = list(begin)
    payment = fold(facts)
    for command, clock in steps:
        event = decided(command, payment)
        if not isinstance(event, Fact):
            continue
        event = changed(event, occurred_at=T0 + clock)
        before, payment = payment, evolve(payment, event)
        facts.append(event)

        back = sum(fact.amount_cents for fact in facts if isinstance(fact, PaymentRefunded))
        assert payment.refunded_cents == back
        assert 0 <= back + payment.reserved_cents <= payment.amount_cents
        assert payment.remaining_cents >= 0
        assert (payment.status is Status.REFUNDED) is (back == payment.amount_cents)
        assert payment.reserved_cents == 0 or payment.unsettled is not None
        if before is not None:
            assert payment.updated_at >= before.updated_at
            assert payment.created_at == before.created_at

    assert fold(facts) == payment
    assert fold(facts[cut:], fold(facts[:cut])) == payment
    assert [decode(fact.TOPIC, encode(fact)) for fact in facts] == facts
    began_ = [fact.refund_id for fact in facts if isinstance(fact, RefundInitiated)]
    assert len(set(began_)) == len(began_)


class TestHowManyRefunds:
    """Refused ones cost nothing and do not count; but a stream must stay quick to read."""

    @staticmethod
    def having(status: Status, count: int) -> Payment:
        payment = payment_in("500 under way")
        one = msgspec.structs.replace(payment.refunds[0], status=status, amount_cents=1)
        refunds = tuple(msgspec.structs.replace(one, id=UUID(int=n)) for n in range(count))
        return msgspec.structs.replace(payment, refunds=refunds)

    @pytest.mark.parametrize(
        ("status", "count", "decision"),
        [
            (Status.SUCCESS, REFUNDS_MAX - 1, "RefundInitiated 1"),
            (Status.SUCCESS, REFUNDS_MAX, "PaymentNotRefundable"),
            (Status.PENDING, REFUNDS_MAX, "PaymentNotRefundable"),
            (Status.FAILED, REFUNDS_MAX, "RefundInitiated 1"),
            (Status.FAILED, REFUND_ATTEMPTS_MAX - 1, "RefundInitiated 1"),
            (Status.FAILED, REFUND_ATTEMPTS_MAX, "PaymentNotRefundable"),
        ],
    )
    def test_bounds(self, status: Status, count: int, decision: str) -> None:
        command = partial(refund, 1, "r9", "order")
        assert told(decided(command, self.having(status, count))) == decision
