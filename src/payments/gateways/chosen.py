"""Which provider a payment belongs to: chosen with its intent, and never changed afterwards.

A charge that was begun at one provider is never sent to another, also while that one is down: both
might capture. So refunds and settling go where the payment began, whatever is the default by then.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from payments.errors import StartError
from payments.gateways import Gateway

G = TypeVar("G", bound=Gateway, covariant=True)


class Gateways(Generic[G]):
    """The providers of this process, by name. The first one is the default."""

    def __init__(self, gateways: Sequence[G], by_currency: Mapping[str, str] | None = None) -> None:
        """`by_currency` holds names of providers for the currencies that the default one does not
        take. Raises StartError for a name that stands twice, or that no provider has."""
        self._by_name: dict[str, G] = {}
        for gateway in gateways:
            if gateway.name in self._by_name:
                raise StartError(f"GATEWAYS: two providers are called {gateway.name!r}")
            self._by_name[gateway.name] = gateway
        self._default = gateways[0]
        self._by_currency: dict[str, G] = {}
        for currency, name in (by_currency or {}).items():
            if name not in self._by_name:
                raise StartError(
                    f"GATEWAY_BY_CURRENCY: {currency} is to go to a provider that GATEWAYS does "
                    f"not name: there are {', '.join(self._by_name)}"
                )
            self._by_currency[currency] = self._by_name[name]

    def __iter__(self) -> Iterator[G]:
        return iter(self._by_name.values())

    def for_new(self, currency: str) -> G:
        """Where a new payment in this currency is charged."""
        return self._by_currency.get(currency, self._default)

    def of(self, name: str) -> G | None:
        """Where a payment was begun; None if that provider is not configured any more."""
        return self._by_name.get(name)

    def declines_may_turn_s(self) -> dict[str, float]:
        """For how long each provider may capture after it declined, by name."""
        return {each.name: each.declines_may_turn_s for each in self}

    async def close(self) -> None:
        for gateway in self:
            await gateway.close()
