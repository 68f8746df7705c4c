"""Gateways whose providers are checked by `payments doctor`: one factory for each."""

import asyncio

from payments.gateways import NeverSent, ProviderFinding
from payments.settings import Settings
from tests.doubles.gateway import ScriptedGateway

SECRET = "sk_canary_7391"
closed: list[str] = []


class CheckedGateway(ScriptedGateway):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def findings(self, timeout_s: float) -> list[ProviderFinding]:
        self.loop = asyncio.get_running_loop()
        if self.name == "broken":
            raise ValueError(SECRET)
        if self.name == "unreachable":
            raise NeverSent("no connection")
        if self.name == "hanging":
            await asyncio.sleep(60)
        webhooks = "no webhook secret: set X_WEBHOOK_SECRETS: `payments settings`"
        return [ProviderFinding(False, "account a_1"), ProviderFinding(True, webhooks)]

    async def close(self) -> None:
        assert asyncio.get_running_loop() is self.loop  # else its connections cannot be closed
        closed.append(self.name)


def checked(settings: Settings) -> CheckedGateway:
    return CheckedGateway("checked")


def broken(settings: Settings) -> CheckedGateway:
    return CheckedGateway("broken")


def unreachable(settings: Settings) -> CheckedGateway:
    return CheckedGateway("unreachable")


def hanging(settings: Settings) -> CheckedGateway:
    return CheckedGateway("hanging")
