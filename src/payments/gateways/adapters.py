"""What the adapters of providers share: their address, and the exchanges of one call."""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.http import ProviderResponse
from payments.http_url import HttpUrl

H = TypeVar("H")
T = TypeVar("T")


def connected(variable: str, base: HttpUrl, connect: Callable[[str], H]) -> H:
    """What `connect` makes of the address. Raises StartError, which names the variable and repeats
    no value, for one that is unusable, or that would get the credentials in the clear."""
    if base.scheme != "https" and not _is_loopback(base.host):
        raise StartError(
            f"{variable} must begin with https://, except on this machine: it gets the credentials"
        )
    try:
        return connect(base.text)
    except ValueError as error:
        raise StartError(f"{variable}: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def after_sending(asking: Awaitable[T]) -> T:
    """What is asked after a request that was sent: if this is never sent, that was all the same."""
    try:
        return await asking
    except NeverSent as error:
        raise OutcomeUnknown(str(error), is_outage=error.is_outage) from None


class Exchanges:
    """Those of one call of a gateway; `timeout_s` is for all of them together."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at = time.monotonic() + timeout_s
        self._sent = False

    async def repeated(
        self,
        exchange: Callable[[float], Awaitable[ProviderResponse]],
        is_busy: Callable[[ProviderResponse], bool],
        wait_s: float,
        *,
        moves: bool = True,
    ) -> ProviderResponse:
        """Asks again each `wait_s` while the provider is busy with the same. `exchange` takes the
        time that is left. Once what `moves` was sent, NeverSent would not be true of the call."""
        while True:
            asking = exchange(self._left_s())
            response = await (after_sending(asking) if self._sent else asking)
            self._sent = self._sent or moves
            if not is_busy(response) or self._left_s() < 2 * wait_s:
                return response
            await asyncio.sleep(wait_s)

    def _left_s(self) -> float:
        return self._ends_at - time.monotonic()
