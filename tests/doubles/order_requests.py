"""What Order Service was sent, as it came and as it went; and what is wrong with it."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from tests.doubles.order_faults import FaultKind
from tests.doubles.order_states import Effect, Signature, decode

CALLBACK_PATH = "/v1/payments/callback"
ORDERS_PATH = "/v1/orders/"  # and an order_id


class Request(msgspec.Struct, dict=True, omit_defaults=True):
    """One request that came whole. Times are of CLOCK_MONOTONIC, the same in all processes."""

    number: int  # in order of arrival, from 0
    connection: int  # the number of its connection, from 0
    arrived: float
    method: str
    path: str
    headers: dict[str, str]  # names in lower case; of a repeated one the values are joined by ", "
    body: bytes
    signature: Signature = "unchecked"
    fault: FaultKind | None = None
    effect: Effect | None = None  # None: nothing was done with it (yet)
    done: float = 0.0  # when it was
    # When it was answered, or its connection ended; None: still under way.
    finished: float | None = None
    status: int | None = None  # of the answer, once a whole head of one was sent
    accepted: bool = False  # done, and a whole head with a 2xx was sent
    problem: str = ""  # why it was rejected

    @cached_property
    def content(self) -> Any:
        """The decoded body; None if it is no JSON."""
        return decode(self.body)

    def get(self, name: str) -> Any:
        """A member of the body; None if there is none."""
        return self.content.get(name) if isinstance(self.content, dict) else None

    @property
    def order_id(self) -> str:
        """In lower case; "" if there is none."""
        order_id = self.get("order_id")
        return order_id.lower() if isinstance(order_id, str) else ""

    @property
    def outcome(self) -> Any:
        """The payment's status of which it tells."""
        return self.get("status")


def read_log(path: Path) -> list[Request]:
    """The requests of a log, each as it was last written, in order of arrival."""
    requests: dict[int, Request] = {}
    for line in path.read_bytes().splitlines():
        request = msgspec.json.decode(line, type=Request)
        requests[request.number] = request
    return [requests[number] for number in sorted(requests)]


def findings(requests: Iterable[Request], refunded: Collection[Any] = ()) -> list[str]:
    """Everything that a sound sender would not have done, or would not have let happen.

    REFUNDED for a confirmed order is none: it is sent to a receiver that wants it. Neither is a
    FAILED once all that was paid for the order went back: `refunded` are the ids of payments of
    which the whole amount did, whether or not the receiver was told.
    """
    requests = list(requests)
    orders, payments = defaultdict(list), defaultdict(list)
    for request in requests:
        if request.order_id:
            orders[request.order_id].append(request)
        if isinstance(request.get("sequence"), int):
            payments[request.get("payment_id")].append(request)
    found: list[str] = []
    for order_id, sent in orders.items():
        about = [*_tickets(sent), *_broken(sent, refunded), *_overlaps(sent)]
        about += _failed_after_success(sent, refunded)
        found += [f"order {order_id}: {text}" for text in about]
    for payment_id, sent in payments.items():
        found += [f"payment {payment_id}: {text}" for text in _out_of_order(sent)]
    for request in requests:
        found += [f"request {request.number}: {text}" for text in _form(request)]
    return found


def _tickets(sent: list[Request]) -> Iterator[str]:
    issuing = [str(request.number) for request in sent if request.effect == "issued"]
    if len(issuing) > 1:
        yield f"tickets issued {len(issuing)} times, by requests {', '.join(issuing)}"


def _broken(sent: list[Request], refunded: Collection[Any]) -> Iterator[str]:
    paid = [each.done for each in sent if each.effect is not None and _is_money(each, refunded)]
    for request in sent:
        was_paid = any(done <= request.done for done in paid)
        if was_paid and request.effect == "broken" and request.outcome != "REFUNDED":
            yield f"it was confirmed, and request {request.number} ({request.outcome}) broke it"


def _overlaps(sent: list[Request]) -> Iterator[str]:
    """Who leaves a request no longer has it under way, whatever is still done with it."""
    last, end = -1, 0.0  # the request that was under way longest so far
    for request in sent:
        if request.arrived < end:
            yield f"request {request.number} came while {last} was under way"
        finished = math.inf if request.finished is None else request.finished
        if finished >= end:
            last, end = request.number, finished


def repeated_early(requests: Iterable[Request]) -> list[str]:
    """Those that came while an earlier one of the order was still worked at, whether or not its
    sender had left. Only what was done counts, so look when nothing is worked at any more."""
    orders = defaultdict(list)
    for request in requests:
        if request.order_id and request.effect is not None:
            orders[request.order_id].append(request)
    found: list[str] = []
    for order_id, sent in orders.items():
        end = 0.0
        for request in sent:
            if request.arrived < end:
                found.append(f"order {order_id}: request {request.number} came before its time")
            end = max(end, request.done)
    return found


def _is_money(request: Request, refunded: Collection[Any]) -> bool:
    """It tells of a payment that did not go back."""
    return request.outcome == "SUCCESS" and request.get("payment_id") not in refunded


def _failed_after_success(sent: list[Request], refunded: Collection[Any]) -> Iterator[str]:
    success = None
    for request in sent:
        if success is not None and request.outcome == "FAILED":
            yield f"request {request.number} is FAILED after {success} (SUCCESS) was accepted"
        if success is None and request.accepted and _is_money(request, refunded):
            success = request.number


def _out_of_order(sent: list[Request]) -> Iterator[str]:
    """Of the first deliveries: a repetition may come late."""
    seen: set[int] = set()
    for request in sent:
        sequence = request.get("sequence")
        if sequence not in seen and seen and sequence < max(seen):
            yield f"sequence {sequence} first came (request {request.number}) after {max(seen)}"
        seen.add(sequence)


def _form(request: Request) -> Iterator[str]:
    headers = request.headers
    if request.method != "POST" or request.path.partition("?")[0] != CALLBACK_PATH:
        yield f"{request.method} {request.path}"
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        yield f"Content-Type is {headers.get('content-type')}"
    if headers.get("accept-encoding") != "identity":
        yield f"Accept-Encoding is {headers.get('accept-encoding')}"
    if "cookie" in headers:
        yield "a cookie was sent"
    if request.signature in ("missing", "invalid"):
        yield f"the signature is {request.signature}"
    if request.signature == "valid" and headers.get("webhook-id") != request.get("event_id"):
        yield f"webhook-id is {headers.get('webhook-id')}, event_id is {request.get('event_id')}"
