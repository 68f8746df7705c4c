"""A scripted provider that sends webhooks."""

import json
import time
from collections.abc import Mapping
from typing import Any

import psycopg

from payments.gateways import Hint
from payments.gateways.http import ProviderHttp
from payments.hints import RecordedHint
from payments.service import Service
from tests.doubles.gateway import PreparingGateway
from tests.doubles.http_gateway import HttpGateway, signed

SECRET = "whsec_canary_52"


class HintingGateway(PreparingGateway):
    """Its webhooks are those of tests/doubles/http_gateway.py. `hint_script` is as `script`."""

    def __init__(self, *script: Any, hint_script: Any = (), **options: Any) -> None:
        super().__init__(*script, **options)
        self.hint_script = list(hint_script)
        self.hints: list[tuple[Mapping[str, str], bytes]] = []
        http = ProviderHttp("http://127.0.0.1:1")
        self._signed = HttpGateway(http, webhook_secrets=[SECRET])

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        self.hints.append((headers, raw_body))
        if self.hint_script:
            return await self._play(self.hint_script, None)  # type: ignore[arg-type,no-any-return]
        return await self._signed.hint(headers, raw_body, timeout_s)


def event(event_id: str = "evt_1", **about: object) -> bytes:
    """`about` is payment_id or reference. What it says of the outcome is not true."""
    named = {name: str(value) for name, value in about.items()}
    return json.dumps({"id": event_id, "status": "captured", **named}).encode()


async def send(service: Service, event_id: str = "evt_1", **about: object) -> RecordedHint:
    body = event(event_id, **about)
    (name,) = service.hints.names
    return await service.hints.take(name, signed(SECRET, time.time(), body), body)


def wait_long(connection: psycopg.Connection[Any], kind: str = "charge") -> None:
    """As after many attempts: the next one is a minute away."""
    connection.execute(
        "UPDATE unsettled_payments SET attempts = 8, since = since - interval '1 hour',"
        " due_at = clock_timestamp() + interval '60 s' WHERE kind = %s",
        [kind],
    )
