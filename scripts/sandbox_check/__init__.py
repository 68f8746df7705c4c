"""What a provider's test mode makes of our gateway, for whoever has test keys.

A module here for each provider, named like it: `async def check(settings, options, report)`. It
builds the gateway as the service does, refuses live keys with StartError, and reports what held.
"""

import asyncio
from contextlib import suppress
from typing import NamedTuple

import click


class Options(NamedTuple):
    """`payment` is the provider's id of what a customer paid or approved there, if it is given;
    `webhooks` the port that the provider's webhooks are forwarded to."""

    currency: str
    webhooks: int | None
    payment: str | None


class Report:
    """Prints a line for each thing that was checked."""

    def __init__(self) -> None:
        self.failed = 0

    def held(self, what: str, held: bool, found: object) -> bool:
        self.failed += not held
        click.echo(f"{'ok  ' if held else 'FAIL'}  {what}: {found}")
        return held

    def skipped(self, what: str, why: str) -> None:
        click.echo(f"skip  {what}: {why}")


async def webhooks(port: int, count: int, wait_s: float) -> list[tuple[dict[str, str], bytes]]:
    """Headers and raw body of the first so many requests to this port; after a while, of fewer."""
    found: list[tuple[dict[str, str], bytes]] = []
    enough = asyncio.Event()

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        pairs = (line.partition(":") for line in head.split("\r\n")[1:])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        found.append((headers, await reader.readexactly(int(headers.get("content-length", 0)))))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        if len(found) >= count:
            enough.set()

    server = await asyncio.start_server(receive, "127.0.0.1", port)
    async with server:
        with suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), wait_s)
    return found
