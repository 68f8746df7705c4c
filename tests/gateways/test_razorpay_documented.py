"""Razorpay's documented examples and its own client: against the decoders and the stand-in.

The examples are not part of this repository: PROVIDER_SPECS names the directory that has them.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import razorpay as official
from razorpay.errors import BadRequestError, SignatureVerificationError

from payments.gateways import BadSignature, Hint, Open, OutcomeUnknown
from payments.gateways.http import ProviderHttp
from payments.gateways.razorpay import RazorpayGateway
from payments.gateways.razorpay_entities import (
    ERROR,
    ORDER,
    PAYMENT,
    REFUND,
    OfPayment,
    cents,
)
from payments.payment.state import Approved, Declined
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET, error, shown, signed, webhook
from tests.doubles.razorpay_server import KEY_ID, KEY_SECRET, RazorpayProcess
from tests.gateways.conformance import WAIT_S, charge_of
from tests.gateways.official import official_file

Example = dict[str, Any]

STATES = {"captured": Approved, "authorized": Open, "failed": Declined, "pending": OutcomeUnknown}


@pytest.fixture(scope="module")
def documented() -> Example:
    return dict(json.loads(official_file("razorpay-examples.json").read_bytes()))


def examples(documented: Example, kind: str) -> Iterator[tuple[Example, bytes]]:
    for example in documented["entities"][kind]:
        yield example["body"], json.dumps(example["body"]).encode()


class TestExamples:
    def test_payments(self, documented: Example) -> None:
        gateway, seen = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID), 0
        for body, raw in examples(documented, "payment"):
            payment = PAYMENT.decode(raw)
            assert (payment.id, payment.amount) == (body["id"], body["amount"])
            assert payment.order_id == body["order_id"]
            assert payment.is_captured is (body["status"] == "captured")
            charge = charge_of(cents(payment), payment.currency, reference=payment.id)
            if STATES[body["status"]] is OutcomeUnknown:
                with pytest.raises(OutcomeUnknown):
                    gateway._standing(payment, charge)
            else:
                assert isinstance(gateway._standing(payment, charge), STATES[body["status"]])
            seen += 1
        assert seen >= 15

    def test_orders_refunds_and_disputes(self, documented: Example) -> None:
        seen = 0
        for body, raw in examples(documented, "order"):
            order = ORDER.decode(raw)
            assert (order.id, order.receipt) == (body["id"], body["receipt"])
            seen += 1
        for body, raw in examples(documented, "refund"):
            refund = REFUND.decode(raw)
            assert (refund.payment_id, refund.receipt) == (body["payment_id"], body["receipt"])
            seen += 1
        for body, raw in examples(documented, "dispute"):
            assert msgspec.json.decode(raw, type=OfPayment).payment_id == body["payment_id"]
            seen += 1
        assert seen >= 13

    def test_errors(self, documented: Example) -> None:
        seen = 0
        for body, raw in examples(documented, "error"):
            detail = ERROR.decode(raw).error
            assert detail.code == body["error"]["code"]
            assert detail.description == body["error"]["description"]
            seen += 1
        assert seen >= 46

    @pytest.mark.anyio
    async def test_webhooks(self, documented: Example) -> None:
        gateway = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID, (WEBHOOK_SECRET,))
        for event, example in documented["webhooks"].items():
            raw, payload = json.dumps(example["body"]).encode(), example["body"]["payload"]
            about = payload["payment"]["entity"]
            hint = await gateway.hint(signed(raw), raw, WAIT_S)
            expected = about["order_id"] or about["id"]
            assert hint == Hint(event_id="evt_1", reference=expected), event
            with pytest.raises(BadSignature):
                await gateway.hint(signed(raw), raw + b" ", WAIT_S)
        assert len(documented["webhooks"]) >= 14


class TestStandIn:
    """What it says has the fields of the documentation, with values of the same kinds."""

    def test_its_payments(
        self, documented: Example, razorpay: RazorpayProcess, client: official.Client
    ) -> None:
        order = client.order.create(ordering(str(uuid4())))
        made = razorpay.entity(razorpay.pay(1500, order_id=order["id"]))
        ((like, _),) = (
            each
            for each in examples(documented, "payment")
            if each[0]["id"] == "pay_DESlfW9H8K9uqM" and each[0]["status"] == "authorized"
        )
        assert kinds(made) == kinds(like)
        razorpay.turn(made["id"], "failed")
        failed = razorpay.entity(made["id"])
        ((like, _),) = (
            each
            for each in examples(documented, "payment")
            if each[0]["id"] == "pay_Epiu9wz2hXBGsJ"
        )
        assert {n: k for n, k in kinds(failed).items() if n.startswith("error_")} == {
            n: k for n, k in kinds(like).items() if n.startswith("error_")
        }

    def test_its_orders_and_refunds(
        self, documented: Example, razorpay: RazorpayProcess, client: official.Client
    ) -> None:
        order = client.order.create(ordering("1"))
        ((first, _), *_) = examples(documented, "order")
        assert order.keys() - {"offer_id"} == first.keys()
        for name in first:
            assert type(order[name]) is type(first[name]), name
        assert shown(razorpay.entity(order["id"])) == order
        payment_id = razorpay.pay(1500, status="captured")
        refund = client.payment.refund(
            payment_id, {"amount": 500, "receipt": "r", "notes": {"a": "b"}}
        )
        like = documented["webhooks"]["refund.processed"]["body"]["payload"]["refund"]["entity"]
        assert refund.keys() == like.keys()

    def test_its_errors_and_webhooks(self, documented: Example) -> None:
        (like,) = (
            body
            for body, _ in examples(documented, "error")
            if body["error"]["description"] == "The amount must be at least INR 1.00"
        )
        assert error("The amount must be at least INR 1.00", "amount") == like
        like = documented["webhooks"]["payment.authorized"]["body"]
        made = json.loads(
            webhook("payment.authorized", payment=like["payload"]["payment"]["entity"])
        )
        assert made.keys() == like.keys()
        assert made["payload"] == like["payload"]


@pytest.fixture
def client(razorpay: RazorpayProcess) -> official.Client:
    return official.Client(auth=(KEY_ID, KEY_SECRET), base_url=razorpay.url)


class TestOfficialClient:
    """Razorpay's own client is a second one for the stand-in."""

    def test_an_order_from_its_making_to_its_refund(
        self, razorpay: RazorpayProcess, client: official.Client
    ) -> None:
        receipt = str(uuid4())
        order = client.order.create(ordering(receipt))
        assert client.order.create(ordering(receipt)) == order
        assert client.order.fetch(order["id"]) == order
        assert client.order.all({"receipt": receipt})["items"] == [order]
        assert client.order.payments(order["id"])["items"] == []
        payment_id = razorpay.pay(1500, order_id=order["id"])
        assert client.order.payments(order["id"])["items"] == [client.payment.fetch(payment_id)]
        assert client.payment.edit(payment_id, {"notes": {"a": "b"}})["notes"] == {"a": "b"}
        captured = client.payment.capture(payment_id, 1500, {"currency": "INR"})
        assert captured["status"] == "captured"
        assert client.order.fetch(order["id"])["status"] == "paid"
        refund = client.payment.refund(payment_id, {"amount": 600, "receipt": "r1"})
        assert client.payment.fetch_multiple_refund(payment_id, {})["items"] == [refund]
        assert client.payment.fetch(payment_id)["amount_refunded"] == 600

    def test_its_errors(self, razorpay: RazorpayProcess, client: official.Client) -> None:
        payment_id = razorpay.pay(1500)
        client.payment.capture(payment_id, 1500, {"currency": "INR"})
        calls: dict[str, Callable[[], object]] = {
            "already been captured": lambda: client.payment.capture(payment_id, 1500),
            "does not exist": lambda: client.payment.fetch("pay_00000000999999"),
            "not a valid id": lambda: client.payment.fetch("pay_1"),
            "must be at least INR 1.00": lambda: client.order.create(
                {"amount": 99, "currency": "INR"}
            ),
            "greater than amount captured": lambda: client.payment.refund(
                payment_id, {"amount": 1501}
            ),
            "Authentication failed": lambda: official.Client(
                auth=(KEY_ID, "wrong"), base_url=razorpay.url
            ).payment.fetch(payment_id),
        }
        for description, call in calls.items():
            with pytest.raises(BadRequestError, match=description):
                call()

    @pytest.mark.anyio
    async def test_it_verifies_what_is_verified_here(self) -> None:
        client = official.Client(auth=(KEY_ID, KEY_SECRET))
        body = webhook("payment.captured", payment={"id": "pay_1", "notes": ["€"]})
        true = signed(body)["x-razorpay-signature"]
        for secret in (WEBHOOK_SECRET, "another"):
            gateway = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID, (secret,))
            for signature in (
                true,
                true[:-1],
                true.upper(),
                "",
                signed(body, "another")["x-razorpay-signature"],
            ):
                try:
                    theirs = client.utility.verify_webhook_signature(
                        body.decode(), signature, secret
                    )
                except SignatureVerificationError:
                    theirs = False
                try:
                    await gateway.hint({"x-razorpay-signature": signature}, body, WAIT_S)
                    ours = True
                except BadSignature:
                    ours = False
                assert ours is bool(theirs)


def ordering(receipt: str) -> Example:
    return {
        "amount": 1500,
        "currency": "INR",
        "receipt": receipt,
        "unique_receipt": True,
        "notes": {"payment_id": receipt},
    }


def kinds(entity: Example) -> dict[str, type]:
    """Of its values."""
    return {name: type(value) for name, value in entity.items()}
