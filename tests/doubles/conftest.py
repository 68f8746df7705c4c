from collections.abc import AsyncIterator

import pytest

from tests.doubles.order_client import Client
from tests.doubles.order_service import OrderService


@pytest.fixture
async def orders() -> AsyncIterator[OrderService]:
    async with OrderService() as running:
        yield running


@pytest.fixture
async def client(orders: OrderService) -> AsyncIterator[Client]:
    async with Client(orders.url) as opened:
        yield opened
