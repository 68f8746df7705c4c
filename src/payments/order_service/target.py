"""The target of requests to Order Service, from the settings."""

from typing import Self

import msgspec

from payments.database.resolving import addresses_of
from payments.errors import StartError
from payments.http_url import HttpUrl
from payments.order_service.addresses import is_near
from payments.setting_values import Network
from payments.settings import Settings

RESOLVE_TIMEOUT_S = 2.0  # a slow name server must not delay the start


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """`url` receives the requests; that of ORDER_STATUS_URL contains a placeholder for the order's
    id.

    `keys` sign them; without keys they are not signed. Plain http goes only to near addresses
    (is_near), including `networks`. `variable`, the name of the setting, and `requests`, the kind
    of request, are for messages.
    """

    url: HttpUrl
    keys: tuple[bytes, ...] = ()
    networks: tuple[Network, ...] = ()
    variable: str = "ORDER_CALLBACK_URL"
    requests: str = "callbacks"

    @classmethod
    def of_callbacks(cls, settings: Settings) -> Self | None:
        """None without ORDER_CALLBACK_URL."""
        if settings.order_callback_url is None:
            return None
        return cls(
            url=settings.order_callback_url,
            keys=settings.order_callback_secret,
            networks=settings.http_callback_networks,
        )

    @classmethod
    def of_order_status(cls, settings: Settings) -> Self | None:
        """None without ORDER_STATUS_URL. Status requests are not signed."""
        if settings.order_status_url is None:
            return None
        return cls(
            url=settings.order_status_url,
            networks=settings.http_callback_networks,
            variable="ORDER_STATUS_URL",
            requests="order status queries",
        )

    def __repr__(self) -> str:
        return f"Target({self.url.origin!r})"

    @property
    def signed(self) -> str:
        return "signed" if self.keys else "not signed"


async def check_target(target: Target) -> str | None:
    """Checks the target before it is used, within RESOLVE_TIMEOUT_S.

    Raises StartError if it can never work: plain http to a host without a near address. Returns a
    warning if the host's name cannot be resolved yet, else None.
    """
    url = target.url
    try:
        addresses = await addresses_of(url.host, RESOLVE_TIMEOUT_S)
    except OSError:
        return f"{url.host} cannot be resolved yet: {target.requests} will wait until it can be"
    if url.scheme == "http" and not any(is_near(each, target.networks) for each in addresses):
        raise StartError(
            f"{target.variable}: {url.origin} has no loopback or private address, and plain "
            "http is allowed to those only (never to cloud metadata services); use https, or add "
            "its network to HTTP_CALLBACK_NETWORKS"
        )
    return None
