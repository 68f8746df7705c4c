"""`payments callbacks test`: what it sends, what it says, and its exit code."""

import asyncio
import json
import subprocess

import pytest
from standardwebhooks import Webhook

from tests.callbacks.raw_server import OK, WAIT_S, Writing, serving
from tests.process import free_port, run

pytestmark = pytest.mark.anyio
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 9\r\n\r\nbad\x1b[31m\n"


async def ping(url: str, **settings: object) -> subprocess.CompletedProcess[str]:
    address = {"ORDER_CALLBACK_URL": f"{url}/callback?token=canary", "CALLBACK_TIMEOUT_S": 0.5}
    done = await asyncio.to_thread(run, "callbacks", "test", **(address | settings))
    assert "canary" not in done.stdout + done.stderr
    return done


async def test_a_ping_is_signed_and_tells_no_outcome() -> None:
    async with serving(OK) as server:
        done = await ping(server.url, ORDER_CALLBACK_SECRET=SECRET)
    assert done.returncode == 0
    first, answer = done.stdout.splitlines()
    assert first.startswith(f"{server.url} responded 200 after 0.")
    assert first.endswith(" s; signed")
    assert answer == "OK"
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    start, *lines = head.decode().split("\r\n")
    assert start == "POST /callback?token=canary HTTP/1.1"
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    Webhook(SECRET).verify(body.decode(), headers)
    told = json.loads(body)
    assert told.keys() == {"type", "event_id", "occurred_at"}
    assert (told["type"], told["event_id"]) == ("ping", headers["webhook-id"])


async def test_what_is_not_2xx_is_a_finding() -> None:
    async with serving(REFUSED) as server:
        done = await ping(server.url)
    assert done.returncode == 1
    assert " responded 401 after " in done.stdout
    assert done.stdout.splitlines()[0].endswith("; not signed")
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("answer", [None, b"garbage\r\n\r\n"])
async def test_without_a_response_it_is_not_known(answer: Writing | bytes | None) -> None:
    async with serving(answer) as server:
        done = await ping(server.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "gave no response" in done.stderr
    assert "it was sent" in done.stderr


async def test_nobody_there_is_told_from_nobody_who_answers() -> None:
    done = await ping(f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "nothing was sent" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ORDER_CALLBACK_URL": ""}, "ORDER_CALLBACK_URL is not set"),
        ({"ORDER_CALLBACK_SECRET": "secret"}, "ORDER_CALLBACK_SECRET"),
        ({"ORDER_CALLBACK_URL": "http://192.0.2.1/"}, "not loopback or private"),
    ],
)
async def test_what_cannot_be_tried_is_no_finding(settings: dict[str, object], words: str) -> None:
    done = await asyncio.wait_for(ping("http://127.0.0.1:1", **settings), WAIT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
