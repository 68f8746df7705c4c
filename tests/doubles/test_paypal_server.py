"""The stand-in for PayPal: what the tests of the service rely on."""

from pathlib import Path

import pytest

from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.http import ProviderHttp
from payments.gateways.oauth import OAuthHttp
from payments.gateways.paypal import TOKEN_PATH, PayPalGateway
from payments.payment.state import Approved, Declined
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, PayPalProcess
from tests.doubles.stand_in import Fault
from tests.gateways.conformance import WAIT_S, begun, charge_of, refund_of

pytestmark = pytest.mark.anyio

HOUR_S = 3600


def opened(paypal: PayPalProcess) -> PayPalGateway:
    http = OAuthHttp(ProviderHttp(paypal.url), TOKEN_PATH, CLIENT_ID, CLIENT_SECRET)
    return PayPalGateway(http, environment="sandbox")


async def test_it_remembers_after_a_kill(tmp_path: Path) -> None:
    with PayPalProcess(tmp_path / "ledger.jsonl") as paypal:
        gateway = opened(paypal)
        account = await gateway.account(WAIT_S)
        charge = await begun(gateway, charge_of())
        paypal.script(Fault("answer_lost", "charge"))
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge, WAIT_S)
        paypal.kill()
        with pytest.raises(NeverSent):
            await gateway.find_charge(charge, WAIT_S)
        paypal.start()
        assert await gateway.prepare(charge, WAIT_S) == charge.reference
        found = await gateway.find_charge(charge, WAIT_S)
        assert isinstance(found, Approved)
        refund = refund_of(found, 900, charge.reference)
        given_back = await gateway.refund(refund, WAIT_S)
        paypal.restart()
        assert await gateway.refund(refund, WAIT_S) == given_back
        beyond = refund_of(found, 900, charge.reference)
        assert isinstance(await gateway.refund(beyond, WAIT_S), Declined)
        assert await gateway.account(WAIT_S) == account
        assert (len(paypal.captures()), len(paypal.refunds())) == (1, 1)
        await gateway.close()


async def test_its_keys_live_for_six_hours(tmp_path: Path) -> None:
    with PayPalProcess(tmp_path / "ledger.jsonl") as paypal:
        gateway = opened(paypal)
        charge = await begun(gateway, charge_of())
        paypal.later(gateway.charge_retry_s)
        assert await gateway.prepare(charge, WAIT_S) == charge.reference
        paypal.later(2 * HOUR_S)
        assert await gateway.prepare(charge, WAIT_S) != charge.reference
        await gateway.close()


async def test_its_keys_of_refunds_live_for_45_days(tmp_path: Path) -> None:
    with PayPalProcess(tmp_path / "ledger.jsonl") as paypal:
        gateway = opened(paypal)
        charge = await begun(gateway, charge_of())
        capture = await gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        refund = refund_of(capture, 600, charge.reference)
        first = await gateway.refund(refund, WAIT_S)
        paypal.later(gateway.refund_retry_s)
        assert await gateway.refund(refund, WAIT_S) == first
        paypal.later(48 * HOUR_S)
        assert await gateway.refund(refund, WAIT_S) != first
        assert len(paypal.refunds(refund.refund_id)) == 2
        await gateway.close()
