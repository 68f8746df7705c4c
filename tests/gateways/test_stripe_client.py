"""Around the Stripe gateway: settings, what it refuses and finds, webhooks.

And Stripe's own client, which drives the stand-in, and checks signatures as we do.
"""

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import stripe as official

from payments.errors import StartError
from payments.gateways import BadSignature, Hint, Refusal
from payments.gateways.building import build_gateways
from payments.gateways.stripe import BANK_DEBIT_S, DAY_S, StripeGateway, build
from payments.http_url import parse_http_url
from tests.doubles.stripe_flows import ACTION
from tests.doubles.stripe_server import RESTRICTED_KEY, SECRET_KEY, StripeProcess, signed
from tests.gateways.conformance import WAIT_S, charge_of
from tests.gateways.stripes import (
    RETURN_URL,
    SECRETS,
    check_official,
    hint_of,
    opened_gateway,
    settings_for,
)

pytestmark = pytest.mark.anyio

ASKED: Any = {"amount": 1500, "currency": "inr", "payment_method_types": ["card"]}
BASE = "https://api.stripe.com"
EVENT = {
    "id": "evt_1",
    "object": "event",
    "data": {"object": {"object": "payment_intent", "id": "pi_1"}},
}


@pytest.fixture
def gateway(stripe_gateway: StripeGateway) -> StripeGateway:
    return stripe_gateway


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"stripe_secret_key": None}, "STRIPE_SECRET_KEY"),
            ({"stripe_secret_key": "pk_test_51Hidden"}, "STRIPE_SECRET_KEY"),
            ({"stripe_secret_key": "sk_prod_51Hidden"}, "STRIPE_SECRET_KEY"),
            ({"stripe_secret_key": "sk_test_"}, "STRIPE_SECRET_KEY"),
            ({"stripe_publishable_key": "pk_live_51Hidden"}, "STRIPE_PUBLISHABLE_KEY"),
            ({"stripe_publishable_key": "sk_test_51Hidden"}, "STRIPE_PUBLISHABLE_KEY"),
            ({"stripe_webhook_secrets": ("whsec_1", "51Hidden")}, "STRIPE_WEBHOOK_SECRETS"),
            ({"stripe_api_base": parse_http_url("http://10.0.0.1/")}, "STRIPE_API_BASE"),
            ({"stripe_api_base": parse_http_url("https://a.example/?51Hidden")}, "STRIPE_API_BASE"),
        ],
    )
    def test_that_do_not_fit(self, given: dict[str, Any], named: str) -> None:
        with pytest.raises(StartError, match=named) as raised:
            build(settings_for(BASE, **given))
        assert "Hidden" not in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "base", [BASE, "http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"]
    )
    @pytest.mark.parametrize("key", ["sk_test_1", "rk_test_1"])
    def test_that_fit(self, base: str, key: str) -> None:
        assert build(settings_for(base, stripe_secret_key=key)).name == "stripe"

    def test_by_its_name(self) -> None:
        (built,) = build_gateways(settings_for(BASE, gateways=("stripe",)))
        assert isinstance(built, StripeGateway)

    def test_bank_debits_are_waited_for(self) -> None:
        both = ("card", "sepa_debit")
        assert build(settings_for(BASE)).late_capture_s == DAY_S
        built = build(settings_for(BASE, stripe_payment_method_types=both))
        assert built.late_capture_s == BANK_DEBIT_S

    async def test_test_and_live_mode_are_two_accounts(self, stripe: StripeProcess) -> None:
        stripe.accept_keys(SECRET_KEY, "sk_live_stand_in")
        keys: dict[str, Any] = {
            "stripe_secret_key": "sk_live_stand_in",
            "stripe_publishable_key": None,
        }
        async with opened_gateway(stripe.url) as test, opened_gateway(stripe.url, **keys) as live:
            first, second = await test.account(WAIT_S), await live.account(WAIT_S)
        assert first is not None
        assert second is not None
        assert (first[-5:], second[-5:]) == ("/test", "/live")
        assert first[:-5] == second[:-5]

    async def test_a_restricted_key_names_the_same_account(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        async with opened_gateway(stripe.url, stripe_secret_key=RESTRICTED_KEY) as restricted:
            assert await restricted.account(WAIT_S) == await gateway.account(WAIT_S)


class TestFindings:
    @pytest.mark.parametrize(
        ("given", "accepted", "texts"),
        [
            (
                {},
                [SECRET_KEY],
                {"test mode": False, "can charge": False, "are verified": False, "js": False},
            ),
            (
                {"stripe_webhook_secrets": (), "stripe_publishable_key": None},
                [SECRET_KEY],
                {"no STRIPE_WEBHOOK_SECRETS": False, "no STRIPE_PUBLISHABLE_KEY": False},
            ),
            ({}, [], {"the API key is rejected: put STRIPE_SECRET_KEY right": True}),
            (
                {"stripe_secret_key": RESTRICTED_KEY},
                [RESTRICTED_KEY],
                {"cannot read the account": False},
            ),
        ],
    )
    async def test_of_key_and_account(
        self,
        stripe: StripeProcess,
        given: dict[str, Any],
        accepted: list[str],
        texts: dict[str, bool],
    ) -> None:
        stripe.accept_keys(*accepted)
        async with opened_gateway(stripe.url, **given) as gateway:
            findings = await gateway.findings(WAIT_S)
        for text, bad in texts.items():
            assert [each.bad for each in findings if text in each.text] == [bad], text
        assert any(each.bad for each in findings) is any(texts.values())


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "field"),
        [
            ({"payment_method": None}, "payment_method"),
            ({"payment_method": "tok_visa"}, "payment_method"),
            ({"payment_method": "4242424242424242"}, "payment_method"),
            ({"payment_method": "pm_card visa"}, "payment_method"),
            ({"payment_method": "pm_card/visa"}, "payment_method"),
            ({"amount_cents": 1511, "currency": "KWD"}, "amount_cents"),
            ({"amount_cents": 1510, "currency": "MGA"}, "amount_cents"),
            ({"currency": "VES"}, "currency"),
        ],
    )
    def test_before_anything_is_stored(self, given: dict[str, Any], field: str) -> None:
        gateway = build(settings_for(BASE))
        charge = charge_of(**({"payment_method": "pm_card_visa"} | given))
        refusal = gateway.refuses(charge)
        assert isinstance(refusal, Refusal)
        assert refusal.field == field
        assert refusal.message.startswith("must ")
        assert (given.get("payment_method") or "4242") not in refusal.message

    @pytest.mark.parametrize("method", ["pm_1Abc", "pm_card_visa", "ctoken_1Abc"])
    def test_payment_methods_that_are_taken(self, method: str) -> None:
        assert build(settings_for(BASE)).refuses(charge_of(payment_method=method)) is None


class TestWebhooks:
    async def test_only_ids_are_taken(self, gateway: StripeGateway) -> None:
        assert await hint_of(gateway, EVENT) == Hint(event_id="evt_1", reference="pi_1")

    @pytest.mark.parametrize("kind", ["charge", "refund", "dispute"])
    async def test_what_belongs_to_an_intent(self, gateway: StripeGateway, kind: str) -> None:
        about = {"object": kind, "id": "xx_1", "payment_intent": "pi_2"}
        event = EVENT | {"data": {"object": about}}
        assert await hint_of(gateway, event) == Hint(event_id="evt_1", reference="pi_2")
        event = EVENT | {"data": {"object": about | {"payment_intent": None}}}
        assert await hint_of(gateway, event) is None

    @pytest.mark.parametrize("secrets", [SECRETS, SECRETS[:1], ("whsec_unknown", SECRETS[1])])
    async def test_while_a_secret_is_replaced(
        self, gateway: StripeGateway, secrets: tuple[str, ...]
    ) -> None:
        assert await hint_of(gateway, EVENT, *secrets) is not None

    @pytest.mark.parametrize("age_s", [0, 299, 305, 3600])
    async def test_as_stripe_s_own_client_sees_it(
        self, gateway: StripeGateway, age_s: float
    ) -> None:
        """Header, body, tolerance and secret: one who is believed here is believed there."""
        body = msgspec.json.encode(EVENT)
        sent_at = time.time() - age_s
        for headers, raw in (
            (signed(body, sent_at, SECRETS[1]), body),
            (signed(body, sent_at, "whsec_wrong"), body),
            (signed(body, sent_at, "whsec_wrong", SECRETS[1]), body),
            (signed(body, sent_at, SECRETS[1]), body + b" "),
            ({"stripe-signature": f"t={sent_at:.0f}"}, body),
            ({"stripe-signature": f"t=now,v1={'0' * 64}"}, body),
            ({"stripe-signature": ""}, body),
        ):
            try:
                official.WebhookSignature.verify_header(
                    raw.decode(), headers["stripe-signature"], SECRETS[1], 300
                )
                believed = True
            except official.SignatureVerificationError:
                believed = False
            try:
                ours = await gateway.hint(headers, raw, WAIT_S) is not None
            except BadSignature:
                ours = False
            assert ours is believed

    @pytest.mark.parametrize("body", [b"{}", b"[]", b"\xff", b"no JSON", b"[" * 100_000])
    async def test_what_is_signed_and_no_event(self, gateway: StripeGateway, body: bytes) -> None:
        headers = signed(body, time.time(), SECRETS[1])
        assert await gateway.hint(headers, body, WAIT_S) is None

    async def test_without_secrets_none_is_believed(self, stripe: StripeProcess) -> None:
        async with opened_gateway(stripe.url, stripe_webhook_secrets=()) as gateway:
            with pytest.raises(BadSignature):
                await hint_of(gateway, EVENT)


class TestStripesOwnClient:
    """It takes the stand-in for Stripe."""

    @pytest.fixture
    def client(self, stripe: StripeProcess) -> Iterator[official.StripeClient]:
        http = official.RequestsClient()
        yield official.StripeClient(
            SECRET_KEY,
            base_addresses={"api": stripe.url},
            max_network_retries=0,
            http_client=http,
        )
        http.close()  # type: ignore[no-untyped-call]

    def test_a_charge_and_its_refund(
        self, client: official.StripeClient, stripe: StripeProcess
    ) -> None:
        payment_id = str(uuid4())
        metadata = {"payment_id": payment_id}
        made = client.v1.payment_intents.create(ASKED | {"metadata": metadata})
        assert made.status == "requires_payment_method"
        done = client.v1.payment_intents.confirm(made.id, {"payment_method": "pm_card_visa"})
        assert (done.status, done.amount_received) == ("succeeded", 1500)
        refund = client.v1.refunds.create({"payment_intent": made.id, "amount": 600})
        assert refund.status == "succeeded"
        assert [each.id for each in client.v1.refunds.list({"payment_intent": made.id}).data] == [
            refund.id
        ]
        with pytest.raises(official.InvalidRequestError) as raised:
            client.v1.payment_intents.cancel(made.id)
        assert raised.value.code == "payment_intent_unexpected_state"
        assert len(stripe.moved()) >= 2

    def test_declines_and_actions(self, client: official.StripeClient) -> None:
        intent = client.v1.payment_intents.create(ASKED)
        with pytest.raises(official.CardError) as raised:
            client.v1.payment_intents.confirm(
                intent.id, {"payment_method": "pm_card_chargeDeclined"}
            )
        assert raised.value.code == "card_declined"
        acting: Any = {"payment_method": ACTION, "return_url": RETURN_URL}
        open_ = client.v1.payment_intents.confirm(intent.id, acting)
        assert open_.next_action is not None
        assert open_.next_action.redirect_to_url is not None
        assert client.v1.payment_intents.cancel(intent.id).status == "canceled"

    def test_keys(self, client: official.StripeClient, stripe: StripeProcess) -> None:
        key: Any = {"idempotency_key": str(uuid4())}
        first = client.v1.payment_intents.create(ASKED, key)
        again = client.v1.payment_intents.create(ASKED, key)
        assert again.id == first.id
        assert again.last_response is not None
        assert again.last_response.headers["Idempotent-Replayed"] == "true"
        with pytest.raises(official.IdempotencyError):
            client.v1.payment_intents.create(ASKED | {"amount": 2500}, key)
        stripe.restart()
        assert client.v1.payment_intents.create(ASKED, key).id == first.id
        stripe.accept_keys()
        with pytest.raises(official.AuthenticationError):
            client.v1.payment_intents.retrieve(first.id)


async def test_a_confirmation_token_is_sent_as_such(
    gateway: StripeGateway, stripe: StripeProcess
) -> None:
    charge = charge_of(payment_method="ctoken_1Abc")
    reference = await gateway.prepare(charge, WAIT_S)
    assert isinstance(reference, str)
    await gateway.charge(msgspec.structs.replace(charge, reference=reference), WAIT_S)
    assert len(stripe.moved(charge.payment_id)) == 1


def test_all_of_it_is_as_stripe_describes_it(pytestconfig: pytest.Config) -> None:
    """The last test of the module: what the others have exchanged."""
    check_official(pytestconfig, "GET /v1/payment_intents")
