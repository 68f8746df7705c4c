"""What Razorpay states and what becomes of it; bad input, settings and webhooks."""

import asyncio
import json
from uuid import UUID, uuid4

import msgspec
import pytest

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    Hint,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
)
from payments.gateways.building import GATEWAY_MEMBERS, build_gateways
from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.gateways.razorpay import RazorpayGateway, build
from payments.gateways.razorpay_api import description_of
from payments.gateways.razorpay_entities import RazorpayOrder
from payments.http_url import parse_http_url
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET, Entity, signed, webhook
from tests.doubles.razorpay_server import AUTHORIZATION, KEY_ID, KEY_SECRET, RazorpayProcess
from tests.doubles.stand_in import Fault
from tests.gateways.conformance import WAIT_S, begun, charge_of, refund_of

pytestmark = pytest.mark.anyio

KEYS = {"razorpay_key_id": "rzp_test_abc", "razorpay_key_secret": "hush"}


async def paid(
    razorpay: RazorpayProcess, gateway: RazorpayGateway, status: str = "authorized"
) -> ProviderCharge:
    """A charge of 15.00 by a payment that the customer made at Checkout."""
    method = razorpay.pay(1500, status="authorized")
    if status != "authorized":
        razorpay.turn(method, status)
    return await begun(gateway, charge_of(payment_method=method))


async def ordered(gateway: RazorpayGateway) -> tuple[ProviderCharge, str]:
    charge = charge_of()
    order_id = await gateway.prepare(charge, WAIT_S)
    assert isinstance(order_id, str)
    return msgspec.structs.replace(charge, reference=order_id), order_id


def approved(charge: ProviderCharge, txn_id: str | None = None) -> Approved:
    return Approved(
        id=charge.payment_id,
        amount_cents=1500,
        currency="INR",
        provider_txn_id=txn_id or charge.reference or "",
    )


class TestStates:
    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            ("authorized", Open),
            ("created", Open),
            ("captured", Approved),
            ("failed", Declined("payment_failed")),
            ("expired", Declined("expired")),
            ("pending", OutcomeUnknown),  # of cash on delivery: not documented for payments
            ("anything", OutcomeUnknown),
        ],
    )
    async def test_of_a_payment(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        status: str,
        expected: object,
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway, status)
        if expected is OutcomeUnknown:
            with pytest.raises(OutcomeUnknown):
                await razorpay_gateway.find_charge(charge, WAIT_S)
            return
        found = await razorpay_gateway.find_charge(charge, WAIT_S)
        if expected is Approved:
            expected = approved(charge)
        elif expected is Open:
            # Without an action: at Checkout the customer would begin another payment.
            expected = Open(
                id=charge.payment_id, step="action" if status == "created" else "authorized"
            )
        assert found == expected
        if isinstance(expected, Declined):
            assert await razorpay_gateway.charge(charge, WAIT_S) == expected
            assert razorpay.captures(charge.payment_id) == []

    async def test_a_refunded_payment_was_captured(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        capture = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        await razorpay_gateway.refund(refund_of(capture, 1500, charge.reference), WAIT_S)
        assert razorpay.entity(charge.reference or "")["status"] == "refunded"
        assert await razorpay_gateway.find_charge(charge, WAIT_S) == capture

    @pytest.mark.parametrize(
        ("attempts", "expected"),
        [
            ((), "action"),
            (("failed",), "action"),
            (("created",), "action"),
            (("expired",), "action"),
            (("failed", "authorized"), "authorized"),
            (("authorized", "failed"), "authorized"),
            (("failed", "captured"), 1),
            (("authorized", "authorized"), "authorized"),
        ],
    )
    async def test_of_an_order(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        attempts: tuple[str, ...],
        expected: object,
    ) -> None:
        charge, order_id = await ordered(razorpay_gateway)
        payments = [razorpay.pay(1500, order_id=order_id) for _ in attempts]
        for payment_id, status in zip(payments, attempts, strict=True):
            if status != "authorized":
                razorpay.turn(payment_id, status)
        found = await razorpay_gateway.find_charge(charge, WAIT_S)
        if isinstance(expected, int):
            assert found == approved(charge, payments[expected])
            return
        assert isinstance(found, Open)
        assert (found.id, found.step) == (charge.payment_id, expected)
        if expected == "action":
            assert found.action is not None
            assert found.action.fields["order_id"] == order_id
            assert await razorpay_gateway.charge(charge, WAIT_S) == found
            assert razorpay.captures(charge.payment_id) == []

    async def test_any_captured_payment_of_an_order_counts(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """Not the last one."""
        charge, order_id = await ordered(razorpay_gateway)
        first, *others = [razorpay.pay(1500, order_id=order_id) for _ in range(3)]
        razorpay.turn(first, "captured")
        for other in others:
            razorpay.turn(other, "failed")
        for call in (razorpay_gateway.find_charge, razorpay_gateway.charge):
            assert await call(charge, WAIT_S) == approved(charge, first)

    async def test_a_paid_order_without_a_captured_payment(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge, order_id = await ordered(razorpay_gateway)
        payment_id = razorpay.pay(1500, order_id=order_id, status="captured")
        razorpay.turn(payment_id, "failed")
        with pytest.raises(OutcomeUnknown, match="none of its payments is captured"):
            await razorpay_gateway.find_charge(charge, WAIT_S)

    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            ("processed", Approved),
            ("pending", OutcomeUnknown),
            ("created", OutcomeUnknown),
            ("anything", OutcomeUnknown),
            ("failed", Declined("failed")),
        ],
    )
    async def test_of_a_refund(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        status: str,
        expected: object,
    ) -> None:
        """One that is under way is neither done nor declined, for as long as it takes."""
        charge = await paid(razorpay, razorpay_gateway)
        capture = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        refund = refund_of(capture, 600, charge.reference)
        razorpay.refund_status(status)
        for call in (razorpay_gateway.refund, razorpay_gateway.find_refund):
            if expected is OutcomeUnknown:
                with pytest.raises(OutcomeUnknown):
                    await call(refund, WAIT_S)
            elif expected is Approved:
                assert isinstance(await call(refund, WAIT_S), Approved)
            else:
                assert await call(refund, WAIT_S) == expected


class TestBadInput:
    @pytest.mark.parametrize(
        ("amount", "currency", "code"),
        [(1600, "INR", "amount_differs"), (1500, "USD", "currency_differs")],
    )
    @pytest.mark.parametrize("status", ["authorized", "created"])
    async def test_a_payment_of_another_amount_or_currency(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        amount: int,
        currency: str,
        code: str,
        status: str,
    ) -> None:
        method = razorpay.pay(amount, currency, status=status)
        charge = await begun(razorpay_gateway, charge_of(payment_method=method))
        for call in (razorpay_gateway.charge, razorpay_gateway.find_charge):
            assert await call(charge, WAIT_S) == Declined(code)
        assert not razorpay.entity(method)["captured"]
        assert razorpay.entity(method)["notes"] == []

    async def test_a_captured_payment_of_another_amount_is_stated_as_it_is(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """The caller sees a mismatch: the money was taken."""
        method = razorpay.pay(1600, status="captured")
        charge = await begun(razorpay_gateway, charge_of(payment_method=method))
        outcome = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(outcome, Approved)
        assert outcome.amount_cents == 1600

    async def test_a_payment_that_razorpay_captured_by_itself(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """As the dashboard has it by default: it is marked all the same."""
        charge = await paid(razorpay, razorpay_gateway, "captured")
        assert await razorpay_gateway.charge(charge, WAIT_S) == approved(charge)
        notes = razorpay.entity(charge.reference or "")["notes"]
        assert notes == {"payment_id": str(charge.payment_id)}
        second = msgspec.structs.replace(charge, payment_id=uuid4())
        assert await razorpay_gateway.charge(second, WAIT_S) == approved(charge)

    async def test_a_payment_that_names_another_payment_of_ours(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        other = uuid4()
        method = razorpay.pay(1500, notes={"payment_id": str(other), "seat": "A1"})
        charge = await begun(razorpay_gateway, charge_of(payment_method=method))
        outcome = await razorpay_gateway.charge(charge, WAIT_S)
        assert outcome == Open(id=other, step="authorized")
        assert not razorpay.entity(method)["captured"]
        assert razorpay.entity(method)["notes"]["payment_id"] == str(other)

    async def test_a_payment_of_the_order_of_another_payment(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """Both charges are the same customer's one payment: that of the order has it."""
        charge, order_id = await ordered(razorpay_gateway)
        method = razorpay.pay(1500, order_id=order_id)
        second = await begun(razorpay_gateway, charge_of(payment_method=method))
        for capture in (False, True):
            for call in (razorpay_gateway.charge, razorpay_gateway.find_charge):
                assert await call(second, WAIT_S) == Declined("payment_of_another_order")
            if not capture:
                outcome = await razorpay_gateway.charge(charge, WAIT_S)
                assert outcome == approved(charge, method)
        assert len(razorpay.captures(charge.payment_id)) == 1

    async def test_a_payment_of_an_order_that_is_not_of_this_service(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        http = ProviderHttp(razorpay.url, {"Authorization": AUTHORIZATION})
        body = {"amount": 1500, "currency": "INR", "receipt": "order 12"}
        made = await http.exchange("POST", "/v1/orders", timeout_s=WAIT_S, body=body)
        await http.close()
        method = razorpay.pay(1500, order_id=json.loads(made.body)["id"], notes={"seat": "A1"})
        charge = await begun(razorpay_gateway, charge_of(payment_method=method))
        assert await razorpay_gateway.charge(charge, WAIT_S) == approved(charge)
        notes = {"seat": "A1", "payment_id": str(charge.payment_id)}
        assert razorpay.entity(method)["notes"] == notes

    @pytest.mark.parametrize("reference", ["pay_00000000999999", "order_00000000999999"])
    async def test_what_this_account_does_not_have(
        self, razorpay_gateway: RazorpayGateway, reference: str
    ) -> None:
        charge = charge_of(reference=reference)
        for call in (
            razorpay_gateway.charge,
            razorpay_gateway.find_charge,
            razorpay_gateway.cancel,
        ):
            with pytest.raises(ReferenceNotFound):
                await call(charge, WAIT_S)

    async def test_a_refund_of_what_this_account_does_not_have(
        self, razorpay_gateway: RazorpayGateway
    ) -> None:
        """The key may be that of another account: it is not declined."""
        refund = ProviderRefund(
            refund_id=uuid4(),
            payment_id=uuid4(),
            provider_txn_id="pay_00000000999999",
            amount_cents=100,
            currency="INR",
        )
        for call in (razorpay_gateway.refund, razorpay_gateway.find_refund):
            with pytest.raises(ReferenceNotFound):
                await call(refund, WAIT_S)

    async def test_a_wrong_key(self, razorpay: RazorpayProcess) -> None:
        charge = charge_of(reference=razorpay.pay(1500))
        http = ProviderHttp(razorpay.url, {"Authorization": "Basic d3Jvbmc="}, keep_alive=False)
        gateway = RazorpayGateway(http, KEY_ID)
        asked = (gateway.charge, gateway.find_charge, gateway.cancel, gateway.prepare)
        for call in asked:
            with pytest.raises(OutcomeUnknown, match="401") as raised:
                await call(charge, WAIT_S)
            assert raised.value.is_outage
        bad = [finding.text for finding in await gateway.findings(WAIT_S) if finding.bad]
        assert [text.split(":")[0] for text in bad] == ["rejects the API key"]
        await gateway.close()

    @pytest.mark.parametrize(
        ("amount", "currency", "method", "field"),
        [
            (99, "INR", None, "amount_cents"),
            (1511, "KWD", None, "amount_cents"),
            (1500, "KPW", None, "currency"),
            (1500, "INR", "pm_card_visa", "payment_method"),
            (1500, "INR", "order_00000000000001", "payment_method"),
            (1500, "INR", "pay_1/../orders", "payment_method"),
            (1500, "INR", "", "payment_method"),
            (100, "INR", None, None),
            (99, "USD", "pay_00000000000001", None),
        ],
    )
    def test_what_it_refuses(
        self, amount: int, currency: str, method: str | None, field: str | None
    ) -> None:
        gateway = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID)
        refusal = gateway.refuses(charge_of(amount, currency, payment_method=method))
        assert (refusal and refusal.field) == field


class TestRaces:
    async def test_two_payments_of_ours_with_one_payment_of_a_customer(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """The claim of the service is the fence; without it at most one is approved as its own."""
        for _ in range(4):
            method = razorpay.pay(1500)
            charges = [
                await begun(razorpay_gateway, charge_of(payment_method=method)) for _ in "ab"
            ]
            asked = [razorpay_gateway.charge(each, WAIT_S) for each in charges * 4]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            stated = {each.id for each in outcomes if isinstance(each, Approved)}
            assert len(stated) <= 1
            assert len([e for e in razorpay.captures() if e["id"] == method]) <= 1

    async def test_a_payment_that_another_marks_at_the_same_moment_is_not_captured(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        razorpay.script(Fault("wrong_id", "mark"))
        with pytest.raises(OutcomeUnknown, match="is marked as that of"):
            await razorpay_gateway.charge(charge, WAIT_S)
        assert not razorpay.entity(charge.reference or "")["captured"]

    async def test_a_payment_captured_between_looking_and_capturing(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        razorpay.script(Fault("slow", "mark", seconds=0.5))
        running = asyncio.create_task(razorpay_gateway.charge(charge, WAIT_S))
        while razorpay.entity(charge.reference or "")["notes"] == []:
            await asyncio.sleep(0.02)
        razorpay.turn(charge.reference or "", "captured")
        assert await running == approved(charge)

    async def test_a_payment_that_expires_between_looking_and_capturing(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        razorpay.script(Fault("slow", "mark", seconds=0.5))
        running = asyncio.create_task(razorpay_gateway.charge(charge, WAIT_S))
        while razorpay.entity(charge.reference or "")["notes"] == []:
            await asyncio.sleep(0.02)
        razorpay.turn(charge.reference or "", "expired")
        assert await running == Declined("expired")

    @pytest.mark.parametrize("order", [False, True])
    async def test_a_failed_payment_that_is_authorized_days_later(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway, order: bool
    ) -> None:
        if order:
            charge, order_id = await ordered(razorpay_gateway)
            method = razorpay.pay(1500, order_id=order_id, status="failed")
        else:
            charge = await paid(razorpay, razorpay_gateway, "failed")
            method = charge.reference or ""
            assert await razorpay_gateway.charge(charge, WAIT_S) == Declined("payment_failed")
        assert razorpay_gateway.declines_may_turn_s > 5 * 24 * 3600
        razorpay.turn(method, "authorized")
        found = await razorpay_gateway.find_charge(charge, WAIT_S)
        assert found == Open(id=charge.payment_id, step="authorized")
        razorpay.turn(method, "captured")  # the dashboard's automatic capture
        assert await razorpay_gateway.find_charge(charge, WAIT_S) == approved(charge, method)

    async def test_an_order_of_a_call_whose_response_was_lost_is_found(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        """Neither a second order nor none, also where Razorpay does not know `unique_receipt`."""
        for knows in (True, False):
            razorpay.knows_unique_receipt(knows)
            charge = charge_of()
            razorpay.script(Fault("answer_lost", "prepare", count=1 + (not knows)))
            if knows:
                with pytest.raises(OutcomeUnknown):
                    await razorpay_gateway.prepare(charge, WAIT_S)
            razorpay.script()
            order_id = await razorpay_gateway.prepare(charge, WAIT_S)
            assert await razorpay_gateway.prepare(charge, WAIT_S) == order_id
            receipt = str(charge.payment_id)
            made = [each for each in razorpay.entities("order") if each["receipt"] == receipt]
            assert [each["id"] for each in made] == [order_id]

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            ({"field": "amount"}, "input_validation_failed"),
            (
                {
                    "description": "Order amount less than minimum amount allowed",
                    "reason": "amount_less_than_minimum_amount",
                },
                "amount_less_than_minimum_amount",
            ),
            (
                {"description": "Amount exceeds maximum amount allowed.", "reason": "NA"},
                "BAD_REQUEST_ERROR",
            ),
            ({"description": "Currency is not supported", "reason": ""}, "BAD_REQUEST_ERROR"),
        ],
    )
    async def test_an_order_that_razorpay_never_makes_is_declined(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        error: dict[str, str],
        code: str,
    ) -> None:
        razorpay.makes_no_order(**error)
        assert await razorpay_gateway.prepare(charge_of(), WAIT_S) == Declined(code)

    @pytest.mark.parametrize(
        "error",
        [
            {"description": "Authentication failed"},
            {"description": "Order receipt should be unique.", "field": "receipt"},
            {"description": "The request has failed; the amount is fine"},
            {"description": "Amount exceeds maximum amount allowed.", "code": "SERVER_ERROR"},
        ],
    )
    async def test_any_other_rejection_of_an_order_may_not_last(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway, error: dict[str, str]
    ) -> None:
        charge = charge_of()
        razorpay.makes_no_order(**error)
        with pytest.raises(OutcomeUnknown, match="400"):
            await razorpay_gateway.prepare(charge, WAIT_S)
        razorpay.as_at_first()
        assert isinstance(await razorpay_gateway.prepare(charge, WAIT_S), str)

    async def test_of_two_orders_the_paid_one_counts(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = charge_of()
        await razorpay_gateway.prepare(charge, WAIT_S)
        razorpay.script(Fault("forgets_keys", "prepare"))
        second = await razorpay_gateway._api.make_order(
            charge, 12, asyncio.get_running_loop().time() + WAIT_S
        )
        assert isinstance(second, RazorpayOrder)
        razorpay.pay(1500, order_id=second.id, status="captured")
        assert await razorpay_gateway.prepare(charge, WAIT_S) == second.id

    async def test_an_order_is_captured_by_the_service_alone(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        _, order_id = await ordered(razorpay_gateway)
        assert razorpay.entity(order_id)["capture"] == "manual"

    async def test_a_refund_whose_key_is_forgotten_is_not_declined(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        capture = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        refund = refund_of(capture, 1500, charge.reference)
        first = await razorpay_gateway.refund(refund, WAIT_S)
        razorpay.script(Fault("forgets_keys", "refund"))
        assert await razorpay_gateway.refund(refund, WAIT_S) == first
        assert len(razorpay.refunds(refund.refund_id)) == 1

    async def test_a_refund_is_found_behind_the_first_page(
        self,
        razorpay: RazorpayProcess,
        razorpay_gateway: RazorpayGateway,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("payments.gateways.razorpay_api.PAGE", 2)
        charge = await paid(razorpay, razorpay_gateway)
        capture = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        refunds = [refund_of(capture, 100, charge.reference) for _ in range(5)]
        made = [await razorpay_gateway.refund(each, WAIT_S) for each in refunds]
        assert [await razorpay_gateway.find_refund(each, WAIT_S) for each in refunds] == made
        unknown = refund_of(capture, 100, charge.reference)
        assert await razorpay_gateway.find_refund(unknown, WAIT_S) is None

    async def test_a_refund_that_was_not_sent_is_not_under_way(
        self, razorpay: RazorpayProcess, razorpay_gateway: RazorpayGateway
    ) -> None:
        charge = await paid(razorpay, razorpay_gateway)
        capture = await razorpay_gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        razorpay.refuse()
        refund = refund_of(capture, 600, charge.reference)
        with pytest.raises(NeverSent):
            await razorpay_gateway.refund(refund, WAIT_S)
        razorpay.listen()
        assert await razorpay_gateway.find_refund(refund, WAIT_S) is None


def hinted(**entities: Entity) -> bytes:
    return webhook("an.event", **entities)


class TestWebhooks:
    ours = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")

    @pytest.mark.parametrize(
        ("body", "payment_id", "reference"),
        [
            (hinted(payment={"id": "pay_1", "order_id": None, "notes": []}), None, "pay_1"),
            (hinted(payment={"id": "pay_1", "order_id": "order_1", "notes": []}), None, "order_1"),
            (
                hinted(
                    payment={"id": "pay_1", "order_id": None, "notes": {"payment_id": str(ours)}}
                ),
                ours,
                None,
            ),
            (
                hinted(
                    payment={"id": "pay_1", "order_id": "order_1", "notes": []},
                    order={"id": "order_1", "notes": {"payment_id": str(ours)}},
                ),
                ours,
                None,
            ),
            (hinted(refund={"id": "rfnd_1", "payment_id": "pay_1"}), None, "pay_1"),
            (hinted(dispute={"id": "disp_1", "payment_id": "pay_1"}), None, "pay_1"),
            (
                hinted(
                    refund={"id": "rfnd_1", "payment_id": "pay_1", "notes": {"payment_id": "x"}},
                    payment={"id": "pay_1", "order_id": "order_1", "notes": {"payment_id": "x"}},
                ),
                None,
                "order_1",
            ),
        ],
    )
    async def test_what_one_is_about(
        self, body: bytes, payment_id: UUID | None, reference: str | None
    ) -> None:
        """Also of a refund or a payment that is not known here yet; nothing is asked."""
        gateway = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID, (WEBHOOK_SECRET,))
        hint = await gateway.hint(signed(body), body, WAIT_S)
        assert hint == Hint(event_id="evt_1", payment_id=payment_id, reference=reference)
        without_id = await gateway.hint(signed(body, event_id=None), body, WAIT_S)
        assert without_id is not None
        assert len(without_id.event_id) == 64
        assert without_id == await gateway.hint(signed(body, event_id=None), body, WAIT_S)

    @pytest.mark.parametrize("body", [b"", b"{}", b"no JSON", b"\xff", hinted(settlement={})])
    async def test_one_about_no_payment(self, body: bytes) -> None:
        gateway = RazorpayGateway(ProviderHttp("http://127.0.0.1:9"), KEY_ID, (WEBHOOK_SECRET,))
        assert await gateway.hint(signed(body), body, WAIT_S) is None

    async def test_its_secrets(self) -> None:
        body = hinted(refund={"id": "rfnd_1", "payment_id": "pay_1"})
        http = ProviderHttp("http://127.0.0.1:9")
        for secrets in ((), ("another",), ("another", "and another")):
            with pytest.raises(BadSignature):
                await RazorpayGateway(http, KEY_ID, secrets).hint(signed(body), body, WAIT_S)
        both = RazorpayGateway(http, KEY_ID, (WEBHOOK_SECRET, "the new one"))
        for secret in (WEBHOOK_SECRET, "the new one"):
            assert await both.hint(signed(body, secret), body, WAIT_S) is not None
        with pytest.raises(BadSignature):
            await both.hint({"x-razorpay-signature": "\udce9"}, body, WAIT_S)
        upper = {name: value.upper() for name, value in signed(body).items()}
        with pytest.raises(BadSignature):
            await both.hint(upper, body, WAIT_S)


class TestBuild:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"razorpay_key_id": None}, "RAZORPAY_KEY_ID"),
            ({"razorpay_key_id": "sk_live_abc"}, "RAZORPAY_KEY_ID"),
            ({"razorpay_key_id": "rzp_test_"}, "RAZORPAY_KEY_ID"),
            ({"razorpay_key_secret": None}, "RAZORPAY_KEY_SECRET"),
            ({"razorpay_api_base": parse_http_url("http://api.razorpay.com")}, "RAZORPAY_API_BASE"),
            ({"razorpay_api_base": parse_http_url("http://10.0.0.1")}, "RAZORPAY_API_BASE"),
            ({"razorpay_api_base": parse_http_url("https://a.example/?x=1")}, "RAZORPAY_API_BASE"),
        ],
    )
    def test_what_is_wrong_is_named(self, changes: dict[str, object], named: str) -> None:
        settings = msgspec.structs.replace(Settings(), **(KEYS | changes))
        with pytest.raises(StartError, match=named) as raised:
            build(settings)
        assert "\n" not in str(raised.value)
        for secret in ("hush", "abc", "x=1"):
            assert secret not in str(raised.value)

    @pytest.mark.parametrize(
        ("abandon_after_s", "expiry_min"), [(60, 12), (600, 12), (1800, 30), (1_000_000, 7200)]
    )
    def test_from_the_settings(self, abandon_after_s: float, expiry_min: int) -> None:
        settings = Settings(**KEYS, pending_abandon_after_s=abandon_after_s)  # type: ignore[arg-type]
        assert build(settings)._expiry_min == expiry_min
        settings = msgspec.structs.replace(settings, gateways=("razorpay",))
        (built,) = build_gateways(settings)
        assert [name for name in GATEWAY_MEMBERS if not hasattr(built, name)] == []

    async def test_with_a_stand_in(self, razorpay: RazorpayProcess) -> None:
        settings = Settings(
            razorpay_key_id=KEY_ID,
            razorpay_key_secret=KEY_SECRET,
            razorpay_api_base=parse_http_url(razorpay.url),
            razorpay_webhook_secrets=(WEBHOOK_SECRET,),
        )
        gateway = build(settings)
        assert [finding.bad for finding in await gateway.findings(WAIT_S)] == [False] * 4
        assert await gateway.account(WAIT_S) == "test"
        charge = await paid(razorpay, gateway)
        assert await gateway.charge(charge, WAIT_S) == approved(charge)
        await gateway.close()


def test_an_error_that_is_nested_too_deeply_is_none_of_razorpays() -> None:
    body = b'{"error":{"description":"no","more":' + b"[" * 20_000 + b"]" * 20_000 + b"}}"
    assert description_of(ProviderResponse(400, body)) == ""
