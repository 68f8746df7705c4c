"""Payments at a provider that prepares its charges, and has its customers act."""

from payments.commands.charge import Charged
from payments.gateways import NextAction
from payments.payment.state import Status
from payments.service import Service
from tests.doubles.gateway import PreparingGateway
from tests.support import charge_of

SECRET = "pi_1_secret_canary7391"
ACTION = NextAction(
    type="provider_sdk", fields={"client_secret": SECRET, "url": f"https://x/{SECRET}"}
)

PREPARED = ["PaymentInitiated", "PaymentReferenced"]
ACTED = [*PREPARED, "PaymentActionRequired"]


def preparing(service: Service) -> PreparingGateway:
    gateway = next(iter(service.gateways))._gateway
    assert isinstance(gateway, PreparingGateway)
    return gateway


async def charge(service: Service, key: str = "k", method: str | None = None) -> Charged:
    return await service.charging.charge(charge_of(key, payment_method=method))


async def charge_pending(service: Service, key: str = "k") -> Charged:
    charged = await charge(service, key)
    assert charged.payment.status is Status.PENDING
    return charged
