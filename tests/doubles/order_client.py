"""A client of Order Service that writes and reads bytes."""

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit
from uuid import uuid4

from tests.doubles.order_receiver import OrderService
from tests.doubles.order_requests import CALLBACK_PATH, Request

KEY = b"0123456789abcdef01234567"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NO_HEADERS: dict[str, str | None] = {}


def event(status: str = "SUCCESS", **changed: Any) -> dict[str, Any]:
    """The body of a callback, with ids of its own."""
    ids = {name: str(uuid4()) for name in ("order_id", "payment_id", "event_id")}
    return ids | {"status": status, "sequence": 2} | changed


def message(
    content: object,
    headers: Mapping[str, str | None] = NO_HEADERS,
    *,
    method: str = "POST",
    path: str = CALLBACK_PATH,
) -> bytes:
    """A request as a sound sender makes it, but for these headers; None: without."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    usual = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "accept-encoding": "identity",
        "content-length": str(len(body)),
    }
    lines = [f"{name}: {value}\r\n" for name, value in (usual | {**headers}).items() if value]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def signed(
    content: dict[str, Any],
    headers: Mapping[str, str | None] = NO_HEADERS,
    *,
    key: bytes = KEY,
    message_id: str = "",
) -> bytes:
    """As Standard Webhooks 1.0 says, by hand."""
    body = json.dumps(content).encode()
    message_id, timestamp = message_id or content["event_id"], str(int(time.time()))
    text = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    usual = {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }
    return message(body, usual | {**headers})


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None) -> None:
        self._address = urlsplit(url)
        self._context = context

    async def __aenter__(self) -> Self:
        host, port = self._address.hostname, self._address.port
        self.reader, self.writer = await asyncio.open_connection(host, port, ssl=self._context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def post(self, request: bytes) -> Answer:
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split(" ")[1]), headers, body)


async def post(orders: OrderService, *contents: dict[str, Any]) -> list[Request]:
    """What became of these, sent one after another."""
    async with Client(orders.url) as client:
        before = len(orders.requests)
        for content in contents:
            await client.post(message(content))
        return orders.requests[before:]
