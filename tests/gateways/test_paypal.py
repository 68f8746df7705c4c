"""What PayPal states and what becomes of it; what clients, attackers and operators get wrong."""

import json
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    Hint,
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
)
from payments.gateways.http import ProviderResponse
from payments.gateways.paypal import PayPalGateway, build
from payments.gateways.paypal_api import (
    CURRENCIES,
    CUSTOMER_AGAIN,
    DECLINES,
    REFUND_DECLINES,
    REFUSALS,
    PayPalCall,
)
from payments.gateways.paypal_orders import (
    NOBODY,
    PayPalOrder,
    read_order,
    read_refund,
    refund_outcome,
    stands,
)
from payments.http_url import parse_http_url
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from tests.doubles.paypal_ledger import MERCHANT_ID
from tests.doubles.paypal_server import CLIENT_SECRET, WEBHOOK_ID, PayPalProcess, signed
from tests.doubles.stand_in import Fault
from tests.gateways.conformance import WAIT_S, begun, charge_of, refund_of

pytestmark = pytest.mark.anyio

OURS, ANOTHER = UUID(int=1), UUID(int=2)
RETURN_URL = "https://shop.example/paid"


@pytest.fixture
def gateway(paypal_gateway: PayPalGateway) -> PayPalGateway:
    return paypal_gateway


def order_of(
    status: str, *captures: tuple[str, dict[str, Any]], intent: str = "CAPTURE", **unit: Any
) -> ProviderResponse:
    """PayPal's order of a payment of ours, with captures of these statuses."""
    made = [
        {"id": f"CAP{n}", "status": of, "custom_id": f"{OURS}", "amount": money("15.00")} | more
        for n, (of, more) in enumerate(captures)
    ]
    units = {"custom_id": f"{OURS}", "invoice_id": f"{OURS}", "amount": money("15.00")} | unit
    links = [{"href": "https://paypal.example/approve", "rel": "approve"}]
    stated = {"id": "ORDER1", "status": status, "intent": intent, "links": links}
    stated["purchase_units"] = [units | {"payments": {"captures": made}}]
    return ProviderResponse(200, json.dumps(stated).encode())


def money(value: str, currency: str = "USD") -> dict[str, str]:
    return {"currency_code": currency, "value": value}


CHARGE = charge_of(1500, "USD", payment_id=OURS, reference="ORDER1")
APPROVED = Approved(id=OURS, amount_cents=1500, currency="USD", provider_txn_id="CAP0")
ACTION = NextAction(type="redirect", fields={"url": "https://paypal.example/approve"})

# Each status of an order and of its capture, and what it means.
ROWS: list[tuple[ProviderResponse, Approved | Declined | Open | None]] = [
    (order_of("COMPLETED", ("COMPLETED", {})), APPROVED),
    (order_of("COMPLETED", ("PARTIALLY_REFUNDED", {})), APPROVED),
    (order_of("COMPLETED", ("REFUNDED", {})), APPROVED),
    (order_of("APPROVED", ("COMPLETED", {})), APPROVED),
    (order_of("COMPLETED", ("DECLINED", {}), ("COMPLETED", {"id": "CAP0"})), APPROVED),
    (order_of("COMPLETED", ("PENDING", {})), Open(id=OURS, step="processing")),
    (order_of("COMPLETED", ("DECLINED", {})), Declined("DECLINED")),
    (order_of("COMPLETED", ("FAILED", {})), Declined("FAILED")),
    (
        order_of("COMPLETED", ("DECLINED", {"processor_response": {"response_code": "5120"}})),
        Declined("5120"),
    ),
    (
        order_of("COMPLETED", ("DECLINED", {"status_details": {"reason": "ECHECK"}})),
        Declined("ECHECK"),
    ),
    (order_of("COMPLETED"), None),
    (order_of("COMPLETED", ("REVERSED", {})), None),
    (order_of("COMPLETED", ("DECLINED", {"custom_id": f"{ANOTHER}"})), None),
    (order_of("COMPLETED", ("COMPLETED", {"amount": money("15.001")})), None),
    (order_of("COMPLETED", ("COMPLETED", {"amount": money("15.00", "XXX")})), None),
    (order_of("VOIDED"), Declined("VOIDED")),
    (order_of("CREATED"), Open(id=OURS, step="action", action=ACTION)),
    (order_of("PAYER_ACTION_REQUIRED"), Open(id=OURS, step="action", action=ACTION)),
    (order_of("APPROVED"), Open(id=OURS, step="ready")),
    (order_of("APPROVED", ("DECLINED", {})), Open(id=OURS, step="ready")),
    (order_of("SAVED"), None),
    (order_of("SOMETHING_NEW"), None),
    (order_of("APPROVED", intent="AUTHORIZE"), Declined("intent_authorize")),
    (
        order_of("APPROVED", intent="AUTHORIZE", invoice_id=f"{OURS} CARD_EXPIRED"),
        Declined("CARD_EXPIRED"),
    ),
    (
        order_of("APPROVED", invoice_id=f"{ANOTHER}", custom_id=f"{ANOTHER}"),
        Open(id=ANOTHER, step="ready"),
    ),
    (order_of("APPROVED", custom_id=f"{ANOTHER}", invoice_id="A-1"), Open(id=OURS, step="ready")),
]


class TestStatuses:
    @pytest.mark.parametrize(("response", "meaning"), ROWS)
    async def test_each(
        self, response: ProviderResponse, meaning: Approved | Declined | Open | None
    ) -> None:
        if meaning is not None:
            assert stands(read_order(response, "ORDER1"), CHARGE) == meaning
            return
        with pytest.raises(OutcomeUnknown) as raised:
            stands(read_order(response, "ORDER1"), CHARGE)
        assert not raised.value.is_outage

    @pytest.mark.parametrize(
        "custom_id", ["", "ticket-17", f"{ANOTHER}", "6ba7b810-9dad-11d1-80b4-00c04fd430cZ"]
    )
    async def test_a_capture_for_nobody_or_another_is_not_taken_for_ours(
        self, custom_id: str
    ) -> None:
        """Also one that the page captured by itself, without us."""
        response = order_of("COMPLETED", ("COMPLETED", {"custom_id": custom_id}))
        found = stands(read_order(response), CHARGE)
        assert isinstance(found, Approved)
        assert found.id == (ANOTHER if custom_id == f"{ANOTHER}" else NOBODY)

    @pytest.mark.parametrize("status", [202, 301, 403, 404])
    async def test_another_response_means_nothing(self, status: int) -> None:
        response = order_of("COMPLETED", ("COMPLETED", {}))._replace(status=status)
        with pytest.raises(OutcomeUnknown):
            read_order(response)

    async def test_an_order_of_another_id_means_nothing(self) -> None:
        with pytest.raises(OutcomeUnknown):
            read_order(order_of("APPROVED"), "ORDER2")


async def customers(
    paypal: PayPalProcess, gateway: PayPalGateway, value: str = "15.00", **fields: Any
) -> ProviderCharge:
    """A charge of 15.00 USD whose payment method is an order that the customer approved."""
    method = paypal.make_order(value, fields.pop("currency", "USD"), **fields)
    return await begun(gateway, charge_of(1500, "USD", payment_method=method))


async def read(gateway: PayPalGateway, charge: ProviderCharge) -> PayPalOrder:
    path = f"/v2/checkout/orders/{charge.reference}"
    return read_order(await gateway._http.exchange("GET", path, timeout_s=WAIT_S))


async def stays_declined(gateway: PayPalGateway, charge: ProviderCharge, code: str) -> None:
    for call in (gateway.charge, gateway.find_charge, gateway.cancel, gateway.charge):
        assert await call(charge, WAIT_S) == Declined(code)


class TestPreparing:
    @pytest.mark.parametrize("issue", sorted(REFUSALS))
    async def test_an_order_that_paypal_never_makes_is_declined(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        paypal.set(makes_not=issue)
        assert await gateway.prepare(charge_of(1500, "USD"), WAIT_S) == Declined(issue)

    @pytest.mark.parametrize(
        "issue", ["COMPLIANCE_VIOLATION", "DUPLICATE_INVOICE_ID", "SOMETHING_NEW"]
    )
    async def test_any_other_rejection_may_not_last(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        charge = charge_of(1500, "USD")
        paypal.set(makes_not=issue)
        with pytest.raises(OutcomeUnknown, match="422"):
            await gateway.prepare(charge, WAIT_S)
        paypal.set(makes_not="")
        assert isinstance(await gateway.prepare(charge, WAIT_S), str)

    async def test_the_order_of_a_lost_response_is_found_first(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = charge_of(1500, "USD")
        paypal.script(Fault("answer_lost", "prepare"))
        with pytest.raises(OutcomeUnknown):
            await gateway.prepare(charge, WAIT_S)
        paypal.set(makes_not="PAYEE_ACCOUNT_RESTRICTED")
        assert isinstance(await gateway.prepare(charge, WAIT_S), str)


class TestCaptures:
    @pytest.mark.parametrize("issue", sorted(DECLINES))
    async def test_a_rejection_that_is_final(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        """It stays so even if PayPal would capture the order later."""
        charge = await customers(paypal, gateway, rejects=issue)
        assert await gateway.charge(charge, WAIT_S) == Declined(issue)
        paypal.change(str(charge.reference), rejects="")
        await stays_declined(gateway, charge, issue)
        assert paypal.captures(charge.payment_id) == []

    @pytest.mark.parametrize("issue", ["PAYEE_NOT_ENABLED_FOR_CARD_PROCESSING", "SOMETHING_NEW"])
    async def test_a_rejection_that_says_nothing_of_the_payer_leaves_it_open(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        charge = await customers(paypal, gateway, rejects=issue)
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge, WAIT_S)
        found = await gateway.find_charge(charge, WAIT_S)
        assert found == Open(id=charge.payment_id, step="ready")

    async def test_a_decline_of_an_order_that_cannot_be_closed_leaves_it_open(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        gateway_charge = await begun(gateway, charge_of(1500, "USD"))
        reference = str(gateway_charge.reference)
        paypal.change(reference, rejects="CARD_EXPIRED", fixed=True)
        with pytest.raises(OutcomeUnknown, match="CARD_EXPIRED"):
            await gateway.charge(gateway_charge, WAIT_S)

    async def test_the_customer_has_to_come_back(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """And the rejection of the first attempt is not returned for ever."""
        assert "PAYER_ACTION_REQUIRED" in CUSTOMER_AGAIN
        charge = await customers(paypal, gateway, rejects="PAYER_ACTION_REQUIRED")
        for _ in range(2):
            found = await gateway.charge(charge, WAIT_S)
            assert isinstance(found, Open)
            assert (found.step, found.action and found.action.type) == ("action", "redirect")
        paypal.approve(str(charge.reference))
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        assert len(paypal.captures(charge.payment_id)) == 1

    async def test_a_declined_capture_of_an_order_that_stays_open(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await customers(paypal, gateway, outcome="DECLINED", ends="APPROVED")
        assert await gateway.charge(charge, WAIT_S) == Declined("DECLINED")
        await stays_declined(gateway, charge, "DECLINED")

    async def test_captured_by_a_request_whose_response_was_lost(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """Nothing is captured again, though neither key nor window holds any more."""
        charge = await customers(paypal, gateway)
        paypal.script(Fault("answer_lost", "charge"))
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge, WAIT_S)
        paypal.later(gateway.charge_retry_s * 2)
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        assert len(paypal.captures(charge.payment_id)) == 1

    async def test_another_key_finds_it_captured(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """ORDER_ALREADY_CAPTURED: the order says what was captured."""
        charge = await begun(gateway, charge_of(1500, "USD"))
        order = await read(gateway, charge)
        first = await gateway.charge(charge, WAIT_S)
        stale = msgspec.structs.replace(order, update_time="2026-01-01T00:00:00Z")
        assert await gateway._capture(PayPalCall(gateway._http, WAIT_S), stale, charge) == first
        assert len(paypal.captures(charge.payment_id)) == 1

    async def test_a_capture_that_was_delayed_finds_the_order_closed(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """As of a process that was frozen between looking and capturing."""
        charge = await begun(gateway, charge_of(1500, "USD"))
        order = await read(gateway, charge)
        closed = await gateway.cancel(charge, WAIT_S)
        assert closed == Declined("cancelled")
        call = PayPalCall(gateway._http, WAIT_S)
        assert await gateway._capture(call, order, charge) == closed
        assert paypal.captures(charge.payment_id) == []

    async def test_an_invoice_id_that_was_used_leaves_the_outcome_unknown(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """Another order was captured for this payment: it is not declined."""
        charge = await customers(paypal, gateway, rejects="DUPLICATE_INVOICE_ID")
        with pytest.raises(OutcomeUnknown, match="DUPLICATE_INVOICE_ID"):
            await gateway.charge(charge, WAIT_S)

    async def test_a_request_still_at_work_is_repeated(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await begun(gateway, charge_of(1500, "USD"))
        paypal.set(conflicts=2)
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        paypal.set(conflicts=99)
        refund = refund_of(APPROVED, 600, charge.reference)
        with pytest.raises(OutcomeUnknown) as raised:
            await gateway.refund(refund, 0.5)
        assert not raised.value.is_outage

    async def test_once_a_capture_was_sent_it_is_not_called_unsent(
        self, paypal: PayPalProcess, gateway: PayPalGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        charge = await customers(paypal, gateway, rejects="ORDER_NOT_APPROVED")
        exchange, paths = gateway._http.exchange, [""]

        async def then_down(method: str, path: str, **more: Any) -> ProviderResponse:
            if paths[-1].endswith("/capture"):
                raise NeverSent("refused")
            paths.append(path)
            return await exchange(method, path, **more)

        monkeypatch.setattr(gateway._http, "exchange", then_down)
        with pytest.raises(OutcomeUnknown) as raised:
            await gateway.charge(charge, WAIT_S)
        assert raised.value.is_outage

    async def test_a_saved_payment_method_needs_no_customer(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        paypal.set(approves=False)
        charge = await begun(gateway, charge_of(1500, "USD", payment_method="vault:8kk8451t"))
        assert await gateway.find_charge(charge, WAIT_S) == Open(id=charge.payment_id, step="ready")
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)

    async def test_a_pending_capture_is_not_offered_for_payment_again(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await customers(paypal, gateway, outcome="PENDING")
        waiting = Open(id=charge.payment_id, step="processing")
        for call in (gateway.charge, gateway.charge, gateway.find_charge, gateway.cancel):
            assert await call(charge, WAIT_S) == waiting
        paypal.finish(str(charge.reference), "DECLINED")
        assert await gateway.find_charge(charge, WAIT_S) == Declined("DECLINED")


class TestOrdersOfCustomers:
    @pytest.mark.parametrize(
        ("order", "code"),
        [
            ({"value": "15.01"}, "amount_mismatch"),
            ({"value": "1500"}, "amount_mismatch"),
            ({"currency": "EUR"}, "currency_mismatch"),
            ({"merchant_id": "2J6QB8YJQSJRJ"}, "payee_mismatch"),
            ({"intent": "AUTHORIZE"}, "intent_authorize"),
            ({"status": "VOIDED"}, "VOIDED"),
        ],
    )
    async def test_one_that_does_not_fit_is_never_captured(
        self, paypal: PayPalProcess, gateway: PayPalGateway, order: dict[str, str], code: str
    ) -> None:
        charge = await customers(paypal, gateway, **order)
        assert await gateway.charge(charge, WAIT_S) == Declined(code)
        await stays_declined(gateway, charge, code)
        assert paypal.captures(charge.payment_id) == []

    async def test_one_with_several_purchase_units(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await customers(paypal, gateway, units=2)
        assert await gateway.charge(charge, WAIT_S) == Declined("several_purchase_units")

    @pytest.mark.parametrize("value", ["15", "15.0", "15.00"])
    async def test_an_equal_amount_is_equal(
        self, paypal: PayPalProcess, gateway: PayPalGateway, value: str
    ) -> None:
        charge = await customers(paypal, gateway, value)
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)

    async def test_one_of_another_payment_of_ours_is_left_alone(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        first = await customers(paypal, gateway, rejects="SOMETHING_NEW")
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(first, WAIT_S)
        second = msgspec.structs.replace(first, payment_id=uuid4())
        for call in (gateway.charge, gateway.find_charge, gateway.cancel):
            found = await call(second, WAIT_S)
            assert found == Open(id=first.payment_id, step="ready")

    async def test_their_own_ids_are_replaced(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """Also if both are UUIDs, as an order's of the shop."""
        for ids in ({"custom_id": f"{uuid4()}"}, {"invoice_id": "A-17"}, {}):
            charge = await customers(paypal, gateway, **ids)
            found = await gateway.charge(charge, WAIT_S)
            assert isinstance(found, Approved)
            assert found.id == charge.payment_id

    async def test_one_that_the_page_captured(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await customers(paypal, gateway)
        captured = msgspec.structs.replace(charge, payment_id=NOBODY)
        await gateway.charge(captured, WAIT_S)
        found = await gateway.charge(charge, WAIT_S)
        assert isinstance(found, Approved)
        assert found.id == NOBODY

    async def test_one_that_is_not_approved_yet(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge = await customers(paypal, gateway, status="CREATED")
        found = await gateway.charge(charge, WAIT_S)
        assert isinstance(found, Open)
        assert found.step == "action"


class TestCustomerStep:
    async def test_where_to_return_to_is_told_once(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        paypal.set(approves=False)
        plain = await begun(gateway, charge_of(1500, "USD"))
        found = await gateway.charge(plain, WAIT_S)
        assert isinstance(found, Open)
        assert found.action is not None
        before = paypal.counts()["confirm"]
        charge = msgspec.structs.replace(plain, return_url=RETURN_URL)
        for _ in range(2):
            again = await gateway.charge(charge, WAIT_S)
            assert isinstance(again, Open)
            assert again.step == "action"
        assert paypal.counts()["confirm"] - before == 1
        paypal.approve(str(charge.reference))
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)

    async def test_while_the_customer_is_there_it_cannot_be_closed(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """PayPal changes no order that waits for the payer: it is watched, until it expires."""
        paypal.set(approves=False)
        charge = await begun(gateway, charge_of(1500, "USD"))
        charge = msgspec.structs.replace(charge, return_url=RETURN_URL)
        stands_open = await gateway.charge(charge, WAIT_S)
        assert await gateway.cancel(charge, WAIT_S) == stands_open
        await gateway.account(WAIT_S)
        paypal.change(str(charge.reference), expired=True)
        assert await gateway.find_charge(charge, WAIT_S) == Declined("order_not_found")


class TestOrdersThatAreGone:
    async def test_an_order_that_expired_is_known_as_such(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        await gateway.account(WAIT_S)
        charge = await customers(paypal, gateway)
        paypal.later(4 * 3600)
        for call in (gateway.charge, gateway.find_charge, gateway.cancel):
            assert await call(charge, WAIT_S) == Declined("order_not_found")

    async def test_one_of_another_account_is_not(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        """It is not known whose account it is until that was compared."""
        charge = charge_of(1500, "USD", reference="5O190127TN364715T")
        for call in (gateway.charge, gateway.find_charge, gateway.cancel):
            with pytest.raises(ReferenceNotFound):
                await call(charge, WAIT_S)

    async def test_one_that_was_not_found_for_a_moment_is_not_gone(
        self, paypal: PayPalProcess, gateway: PayPalGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await gateway.account(WAIT_S)
        charge = await begun(gateway, charge_of(1500, "USD"))
        await gateway.charge(charge, WAIT_S)
        exchange = gateway._http.exchange

        async def behind(method: str, path: str, **more: Any) -> ProviderResponse:
            path = path.replace(str(charge.reference), "UNKNOWN") if method == "GET" else path
            return await exchange(method, path, **more)

        monkeypatch.setattr(gateway._http, "exchange", behind)
        with pytest.raises(OutcomeUnknown) as raised:
            await gateway.find_charge(charge, WAIT_S)
        assert not isinstance(raised.value, ReferenceNotFound)

    async def test_the_account_stays_with_the_merchant(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        assert await gateway.account(WAIT_S) == f"sandbox:{MERCHANT_ID}"


async def sold(gateway: PayPalGateway) -> tuple[ProviderCharge, Approved]:
    charge = await begun(gateway, charge_of(1500, "USD"))
    capture = await gateway.charge(charge, WAIT_S)
    assert isinstance(capture, Approved)
    return charge, capture


class TestRefunds:
    @pytest.mark.parametrize(
        ("status", "outcome"),
        [
            ("COMPLETED", Approved),
            ("PENDING", None),
            ("FAILED", Declined),
            ("CANCELLED", Declined),
        ],
    )
    async def test_each_status(
        self, paypal: PayPalProcess, gateway: PayPalGateway, status: str, outcome: type | None
    ) -> None:
        """Pending is neither failed nor done: it is not sent again."""
        charge, capture = await sold(gateway)
        refund = refund_of(capture, 600, charge.reference)
        paypal.change(str(charge.reference), refund_status=status)
        for call in (gateway.refund, gateway.find_refund, gateway.refund):
            if outcome is not None:
                assert isinstance(await call(refund, WAIT_S), outcome)
                continue
            with pytest.raises(OutcomeUnknown):
                await call(refund, WAIT_S)
        assert len(paypal.orders()[str(charge.reference)].refunds) == 1

    async def test_an_unknown_status_leaves_the_outcome_unknown(self) -> None:
        stated = {"id": "R1", "status": "SOMETHING_NEW", "amount": money("6.00")}
        refund = read_refund(ProviderResponse(201, json.dumps(stated).encode()))
        with pytest.raises(OutcomeUnknown):
            refund_outcome(refund, refund_of(APPROVED, 600))

    @pytest.mark.parametrize("issue", sorted(REFUND_DECLINES))
    async def test_a_rejection_that_is_final(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        charge, capture = await sold(gateway)
        paypal.change(str(charge.reference), refund_rejects=issue)
        refund = refund_of(capture, 600, charge.reference)
        assert await gateway.refund(refund, WAIT_S) == Declined(issue)

    @pytest.mark.parametrize(
        "issue", ["PENDING_CAPTURE", "REFUND_FAILED_INSUFFICIENT_FUNDS", "DUPLICATE_INVOICE_ID"]
    )
    async def test_a_rejection_that_may_pass(
        self, paypal: PayPalProcess, gateway: PayPalGateway, issue: str
    ) -> None:
        charge, capture = await sold(gateway)
        paypal.change(str(charge.reference), refund_rejects=issue)
        refund = refund_of(capture, 600, charge.reference)
        with pytest.raises(OutcomeUnknown):
            await gateway.refund(refund, WAIT_S)

    async def test_a_refund_of_the_dashboard_is_not_ours(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        charge, capture = await sold(gateway)
        theirs = refund_of(capture, 600, charge.reference)
        await gateway.refund(theirs, WAIT_S)
        ours = refund_of(capture, 600, charge.reference)
        assert await gateway.find_refund(ours, WAIT_S) is None
        assert await gateway.find_charge(charge, WAIT_S) == capture

    async def test_a_reference_that_is_not_the_captures(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        (_, capture), (other, _) = await sold(gateway), await sold(gateway)
        with pytest.raises(OutcomeUnknown):
            await gateway.find_refund(refund_of(capture, 600, other.reference), WAIT_S)
        for reference in (None, "lower case", "5O190127TN364715T"):
            asked: ProviderRefund = refund_of(capture, 600, reference)
            with pytest.raises(ReferenceNotFound):
                await gateway.find_refund(asked, WAIT_S)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("charge", "field"),
        [
            (charge_of(1500, "KWD"), "currency"),
            (charge_of(1500, "AED"), "currency"),
            (charge_of(1550, "HUF"), "amount_cents"),
            (charge_of(1, "TWD"), "amount_cents"),
            (charge_of(1500, "USD", payment_method="5o190127tn364715t"), "payment_method"),
            (charge_of(1500, "USD", payment_method="5O190127/../X"), "payment_method"),
            (charge_of(1500, "USD", payment_method="A" * 37), "payment_method"),
            (charge_of(1500, "USD", payment_method="vault:"), "payment_method"),
            (charge_of(1500, "USD", payment_method="vault:a b"), "payment_method"),
            (charge_of(1500, "USD", payment_method=""), "payment_method"),
            (charge_of(1500, "USD", payment_method="A\n"), "payment_method"),
        ],
    )
    async def test_before_anything_is_stored(
        self, gateway: PayPalGateway, charge: ProviderCharge, field: str
    ) -> None:
        refusal = gateway.refuses(charge)
        assert refusal is not None
        assert refusal.field == field
        if charge.payment_method is not None and len(charge.payment_method) > 6:
            assert charge.payment_method not in refusal.message

    async def test_every_currency_of_paypal_is_taken(self, gateway: PayPalGateway) -> None:
        assert len(CURRENCIES) == 25
        assert [each for each in CURRENCIES if gateway.refuses(charge_of(1500, each))] == []


def event(kind: str, resource: dict[str, Any]) -> bytes:
    told = {"id": "WH-1", "event_type": "X.Y", "resource_type": kind, "resource": resource}
    return json.dumps(told).encode()


RELATED = {"supplementary_data": {"related_ids": {"order_id": "ORDER1"}}}


class TestWebhooks:
    @pytest.mark.parametrize(
        ("kind", "resource", "hint"),
        [
            ("checkout-order", {"id": "ORDER1"}, Hint(event_id="WH-1", reference="ORDER1")),
            ("capture", RELATED, Hint(event_id="WH-1", reference="ORDER1")),
            ("capture", {"custom_id": f"{OURS}"}, Hint(event_id="WH-1", payment_id=OURS)),
            ("capture", {"custom_id": "ticket-17"}, None),
            ("refund", {"custom_id": f"{OURS}"}, None),
            (
                "refund",
                {"custom_id": f"{ANOTHER}"} | RELATED,
                Hint(event_id="WH-1", reference="ORDER1"),
            ),
            (
                "dispute",
                {"disputed_transactions": [{"custom": f"{OURS}"}]},
                Hint(event_id="WH-1", payment_id=OURS),
            ),
            ("dispute", {}, None),
            ("checkout-order", {"id": "../v1"}, None),
            ("checkout-order", {"id": 7}, None),
        ],
    )
    async def test_what_each_is_about(
        self, gateway: PayPalGateway, kind: str, resource: dict[str, Any], hint: Hint | None
    ) -> None:
        """A refund has the refund's id where a capture has the payment's."""
        body = event(kind, resource)
        assert await gateway.hint(signed(body), body, WAIT_S) == hint

    async def test_the_bytes_are_passed_on_as_they_came(self, gateway: PayPalGateway) -> None:
        body = b'{ "id" : "WH-1", "resource_type":"checkout-order",\n "resource":{"id":"ORDER1",'
        body += b'"note":"\\u00e9 \xc3\xa9", "rate":1.10, "x":1, "x":2}}'
        hint = await gateway.hint(signed(body), body, WAIT_S)
        assert hint == Hint(event_id="WH-1", reference="ORDER1")

    @pytest.mark.parametrize(
        "body",
        [
            b'{"id":"A"},"webhook_id":"OTHER"',
            b'{"id":"A"}}',
            b"",
            b"[]",
            b"not JSON",
            b'{"id":"\xff"}',
            b'{"a":' * 30_000,
            b'{"id":"' + b"x" * 70_000 + b'"}',
        ],
    )
    async def test_no_body_adds_to_the_question(
        self, paypal: PayPalProcess, gateway: PayPalGateway, body: bytes
    ) -> None:
        """PayPal is not even asked."""
        before = paypal.counts()["verify"]
        with pytest.raises(BadSignature):
            await gateway.hint(signed(body), body, WAIT_S)
        assert paypal.counts()["verify"] == before

    @pytest.mark.parametrize("name", sorted(signed(b"")))
    @pytest.mark.parametrize(
        "value", [None, "", "x" * 600, "a b", "\xe9", 'a"b', "@ftp://a", "1\n"]
    )
    async def test_a_header_that_is_not_well_formed(
        self, paypal: PayPalProcess, gateway: PayPalGateway, name: str, value: str | None
    ) -> None:
        body = event("checkout-order", {"id": "ORDER1"})
        headers = signed(body)
        headers.pop(name)
        if value is not None:
            headers[name] = value
        before = paypal.counts()["verify"]
        with pytest.raises(BadSignature):
            await gateway.hint(headers, body, WAIT_S)
        assert paypal.counts()["verify"] == before

    async def test_what_paypal_does_not_say_is_not_known(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        body = event("checkout-order", {"id": "ORDER1"})
        paypal.script(Fault("500", "verify"))
        with pytest.raises(OutcomeUnknown):
            await gateway.hint(signed(body), body, WAIT_S)
        paypal.refuse()
        with pytest.raises(NeverSent):
            await gateway.hint(signed(body), body, WAIT_S)

    async def test_without_a_webhook_id_none_is_believed(
        self, gateway: PayPalGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gateway, "_webhook_id", None)
        body = event("checkout-order", {"id": "ORDER1"})
        with pytest.raises(BadSignature, match="PAYPAL_WEBHOOK_ID"):
            await gateway.hint(signed(body), body, WAIT_S)


class TestFindings:
    async def test_of_a_sound_configuration(self, gateway: PayPalGateway) -> None:
        found = await gateway.findings(WAIT_S)
        assert [each.bad for each in found] == [False, False]
        assert "sandbox" in found[0].text
        assert "https://pay.example/hook" in found[1].text

    @pytest.mark.parametrize("webhook_id", [None, "1JE4291016473214C", "not an id"])
    async def test_of_another_webhook(
        self, gateway: PayPalGateway, monkeypatch: pytest.MonkeyPatch, webhook_id: str | None
    ) -> None:
        monkeypatch.setattr(gateway, "_webhook_id", webhook_id)
        found = await gateway.findings(WAIT_S)
        # Without webhooks settling asks all the same.
        assert [each.bad for each in found] == [False, webhook_id is not None]
        assert "PAYPAL_WEBHOOK_ID" in found[1].text

    async def test_of_wrong_credentials(
        self, paypal: PayPalProcess, gateway: PayPalGateway
    ) -> None:
        paypal.set(secret="rotated")
        (found,) = await gateway.findings(WAIT_S)
        assert found.bad
        assert "PAYPAL_CLIENT_SECRET" in found.text
        assert CLIENT_SECRET not in found.text

    async def test_of_an_outage(self, paypal: PayPalProcess, gateway: PayPalGateway) -> None:
        paypal.refuse()
        with pytest.raises(NeverSent):
            await gateway.findings(WAIT_S)


GIVEN = {"paypal_client_id": "id", "paypal_client_secret": "a-secret"}


class TestBuild:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"paypal_client_id": None}, "PAYPAL_CLIENT_ID"),
            ({"paypal_client_secret": None}, "PAYPAL_CLIENT_SECRET"),
            ({"paypal_api_base": parse_http_url("http://api.paypal.com")}, "PAYPAL_API_BASE"),
            ({"paypal_api_base": parse_http_url("http://127.evil.example")}, "PAYPAL_API_BASE"),
            ({"paypal_api_base": parse_http_url("https://a.example/?b=c")}, "PAYPAL_API_BASE"),
        ],
    )
    async def test_what_is_missing_or_invalid_is_named(
        self, given: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(StartError, match=named) as raised:
            build(Settings(**(GIVEN | given)))
        assert "a-secret" not in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("given", "origin"),
        [
            ({}, "https://api-m.paypal.com"),
            ({"paypal_environment": "sandbox"}, "https://api-m.sandbox.paypal.com"),
            ({"paypal_api_base": parse_http_url("http://localhost:1")}, "http://localhost:1"),
            ({"paypal_api_base": parse_http_url("http://[::1]:1")}, "http://[::1]:1"),
        ],
    )
    async def test_where_it_goes(self, given: dict[str, Any], origin: str) -> None:
        gateway = build(Settings(**(GIVEN | given), paypal_webhook_id=WEBHOOK_ID))
        assert f"{gateway._http._http!r}" == f"ProviderHttp({origin!r})"
        await gateway.close()
