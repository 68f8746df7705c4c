from collections.abc import AsyncIterator

import httpx
import pytest

from payments.service import Service
from web import operations
from web.app import application, guarded


@pytest.fixture
async def client(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the application without a network in between; metrics are as of now."""
    monkeypatch.setattr(operations, "METRICS_AGE_S", 0.0)
    app = guarded(application(service), service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as opened:
        yield opened
