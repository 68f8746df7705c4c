from collections.abc import AsyncIterator

import httpx
import pytest

from payments.service import Service
from web.app import create_app


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the application without a network in between."""
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as opened:
        yield opened
