"""The exchanges of one call: what was sent before decides what "never sent" means."""

import pytest

from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.adapters import Exchanges
from payments.gateways.http import ProviderResponse

pytestmark = pytest.mark.anyio


async def responds(left_s: float) -> ProviderResponse:
    return ProviderResponse(200, b"")


async def unsent(left_s: float) -> ProviderResponse:
    raise NeverSent("refused")


@pytest.mark.parametrize(("moves", "expected"), [(True, OutcomeUnknown), (False, NeverSent)])
async def test_unsent_after_another_exchange(moves: bool, expected: type[Exception]) -> None:
    exchanges = Exchanges(10)
    await exchanges.repeated(responds, lambda _: False, 0.01, moves=moves)
    with pytest.raises(expected, match="refused"):
        await exchanges.repeated(unsent, lambda _: False, 0.01)


async def test_the_first_that_is_unsent_is_unsent() -> None:
    with pytest.raises(NeverSent):
        await Exchanges(10).repeated(unsent, lambda _: False, 0.01)


async def test_a_busy_provider_is_asked_again_until_time_is_short() -> None:
    left: list[float] = []

    async def busy(left_s: float) -> ProviderResponse:
        left.append(left_s)
        return ProviderResponse(409, b"")

    response = await Exchanges(0.2).repeated(busy, lambda each: each.status == 409, 0.05)
    assert response.status == 409
    assert 1 <= len(left) <= 4
    assert left == sorted(left, reverse=True)
