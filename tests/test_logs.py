"""Logs: one JSON object per line, whatever is logged, and nobody waits for who reads them."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from loguru import logger

import payments.observability.logs
from payments.database.connections import DatabaseAddress
from payments.observability.logs import LogFields, log_money, set_up_logs
from tests.process import PAYMENTS, ServiceProcess, at, environment, free_port
from tests.support import PATIENCE_S, eventually

CANARY = "canary7391"
HOSTILE = [
    "a\nb",
    "a\r\nb",
    "\n",
    '{"level":"CRITICAL"}\n{}',
    "a\u2028b",
    "\x00",
    "\x1b[31m",
    '"\\',
]


class Logs:
    """What was written to stderr since it was last asked for."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self) -> str:
        captured = self._capsys.readouterr()
        assert captured.out == ""
        return captured.err

    def lines(self) -> list[dict[str, Any]]:
        *lines, rest = self.text().split("\n")
        assert rest == ""
        return [json.loads(line) for line in lines]

    def line(self) -> dict[str, Any]:
        (only,) = self.lines()
        return only


def to_stderr(message: str) -> None:
    sys.stderr.write(message)


@pytest.fixture
def logs(capsys: pytest.CaptureFixture[str]) -> Iterator[Logs]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Logs(capsys)
    logger.remove()
    payments.observability.logs._json_stderr = None  # its descriptor may be another's soon
    logger.add(to_stderr)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def json_logs(logs: Logs) -> Logs:
    set_up_logs("json", "INFO")
    return logs


class TestJsonLines:
    def test_a_record(self, json_logs: Logs) -> None:
        logger.bind(payment_id="p-1", amount_cents=1500).warning("charged")
        line = json_logs.line()
        time = datetime.fromisoformat(line.pop("time"))
        assert time.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
        assert line == {
            "level": "WARNING",
            "message": "charged",
            "payment_id": "p-1",
            "amount_cents": 1500,
        }

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_message_is_one_line(self, json_logs: Logs, text: str) -> None:
        logger.info(text)
        assert json_logs.line()["message"] == text

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_field_is_on_that_line(self, json_logs: Logs, text: str) -> None:
        logger.bind(given=text, more={text: [text]}).info("refused")
        line = json_logs.line()
        assert (line["given"], line["more"]) == (text, {text: [text]})

    @pytest.mark.parametrize(
        "text", ["{}", "{0}", "{given}", "{", "}", "{{}}", "{record[level]}", "%s", "<red>x</red>"]
    )
    def test_braces_of_users_are_not_expanded(self, json_logs: Logs, text: str) -> None:
        logger.info(text)
        logger.bind(given=text).info("refused")
        logger.info("refused: {}", text)
        logging.getLogger("library").warning(text)
        first, second, third, fourth = json_logs.lines()
        assert first["message"] == text
        assert second["given"] == text
        assert third["message"] == f"refused: {text}"
        assert fourth["message"] == text

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
            (Path("/srv"), "/srv"),
            (ValueError("wrong"), "wrong"),
            (10**40, 10**40),
            (float("nan"), None),
            (None, None),
        ],
    )
    def test_fields_of_any_type(self, json_logs: Logs, value: object, shown: object) -> None:
        logger.bind(given=value).info("refused")
        assert json_logs.line()["given"] == shown

    @pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
    def test_half_a_surrogate_pair_does_not_lose_the_record(
        self, json_logs: Logs, text: str
    ) -> None:
        logger.bind(given=text).info("refused")
        logger.info(text)
        first, second = json_logs.lines()
        assert first["message"] == "refused"
        assert second["level"] == "INFO"

    @pytest.mark.parametrize("name", ["time", "level", "message", "exception"])
    def test_a_field_cannot_pose_as_the_record(self, json_logs: Logs, name: str) -> None:
        logger.bind(**{name: "forged"}).info("refused")
        line = json_logs.line()
        assert line["level"] == "INFO"
        assert line["message"] == "refused"
        assert datetime.fromisoformat(line["time"])

    def test_the_level_is_a_threshold(self, json_logs: Logs) -> None:
        logger.debug("quiet")
        logger.info("loud")
        assert json_logs.line()["message"] == "loud"
        set_up_logs("json", "ERROR")
        logger.warning("quiet now")
        logger.error("loud")
        assert json_logs.line()["level"] == "ERROR"

    def test_setting_up_twice_writes_once(self, json_logs: Logs) -> None:
        set_up_logs("json", "INFO")
        logger.info("once")
        logging.getLogger("library").warning("once")
        assert len(json_logs.lines()) == 2


def fail(secret: str) -> None:
    held = {"password": secret}
    raise RuntimeError(f"failed with {len(held)} secret")


class TestExceptions:
    @pytest.mark.parametrize("format", ["json", "text"])
    def test_no_value_of_a_variable_is_shown(
        self, logs: Logs, format: Literal["json", "text"]
    ) -> None:
        set_up_logs(format, "DEBUG")
        secret = CANARY
        try:
            fail(secret)
        except RuntimeError as error:
            logger.exception("charge failed")
            logger.opt(exception=error).error("charge failed")
            logging.getLogger("library").exception("charge failed")
        text = logs.text()
        assert text.count("RuntimeError: failed with 1 secret") == 3
        assert CANARY not in text

    def test_a_traceback_is_part_of_its_line(self, json_logs: Logs) -> None:
        try:
            fail(CANARY)
        except RuntimeError:
            logger.bind(request_id="r-1").exception("a\nb {}")
        line = json_logs.line()
        assert line["message"] == "a\nb {}"
        assert line["request_id"] == "r-1"
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert line["exception"].endswith("RuntimeError: failed with 1 secret")

    def test_without_an_exception_there_is_no_such_field(self, json_logs: Logs) -> None:
        logger.error("wrong")
        logging.getLogger("library").error("wrong", exc_info=True)
        first, second = json_logs.lines()
        assert "exception" not in first
        assert second["message"] == "wrong"


class TestLibraries:
    def test_their_warnings_come_to_the_same_place(self, json_logs: Logs) -> None:
        logging.getLogger("library.pool").warning("lost %s\n", "a connection")
        line = json_logs.line()
        assert line["logger"] == "library.pool"
        assert line["level"] == "WARNING"
        assert line["message"] == "lost a connection\n"

    def test_their_chatter_does_not(self, json_logs: Logs) -> None:
        logging.getLogger("library").info("GET /")
        assert json_logs.lines() == []

    def test_levels_of_their_own_are_no_trouble(self, json_logs: Logs) -> None:
        logging.getLogger("library").log(logging.WARNING + 5, "unusual")
        assert json_logs.line()["message"] == "unusual"

    def test_a_broken_log_call_does_not_break_its_caller(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging, "raiseExceptions", False)  # as in production, and quiet
        set_up_logs("json", "INFO")
        logging.getLogger("library").warning("%d connections", "no number")
        logger.info("still there")
        assert logs.lines()[-1]["message"] == "still there"


class TestFormats:
    def test_text(self, logs: Logs) -> None:
        set_up_logs("text", "INFO")
        logger.bind(given="a\nb", markup="<red>", id=UUID(int=1), n=2, last="a b=c").info("refused")
        (line,) = logs.text().splitlines()
        assert re.fullmatch(
            r"\d\d:\d\d:\d\d\.\d{3} INFO     refused given='a\\nb' markup='<red>' "
            r"id=00000000-0000-0000-0000-000000000001 n=2 last='a b=c'",
            line,
        )

    @pytest.mark.parametrize("text", HOSTILE)
    def test_text_is_one_line_too(self, logs: Logs, text: str) -> None:
        set_up_logs("text", "INFO")
        logger.bind(given=text).info(text)
        (line,) = logs.text().splitlines()
        assert all(character.isprintable() for character in line)

    def test_text_ends_with_the_traceback(self, logs: Logs) -> None:
        set_up_logs("text", "INFO")
        try:
            fail(CANARY)
        except RuntimeError:
            logger.bind(n=1).exception("wrong")
        first, second, *_, last = logs.text().splitlines()
        assert first.endswith("ERROR    wrong n=1")
        assert second == "Traceback (most recent call last):"
        assert last == "RuntimeError: failed with 1 secret"

    def test_colours_are_for_terminals(self, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
        for terminal in (True, False):
            monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
            set_up_logs("text", "INFO")
            logger.bind(n=1).error("wrong")
            assert ("\x1b[31m" in logs.text()) is terminal

    @pytest.mark.parametrize("terminal", [True, False])
    def test_auto_is_text_on_a_terminal_only(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch, terminal: bool
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        set_up_logs("auto", "INFO")
        logger.info("here")
        assert logs.text().startswith("{") is not terminal


class TestContext:
    def test_lines_say_what_they_belong_to(self, json_logs: Logs) -> None:
        payment_id = UUID(int=7)
        with LogFields(payment_id=payment_id):
            logging.getLogger("library").warning("slow")
            logger.bind(reason="x").info("asked")
        logger.info("after")
        first, second, third = json_logs.lines()
        assert first["payment_id"] == second["payment_id"] == str(payment_id)
        assert second["reason"] == "x"
        assert "payment_id" not in third


class TestMoney:
    """These lines go past loguru, and must not differ from what it would write."""

    FIELDS: ClassVar[dict[str, Any]] = {"payment_id": UUID(int=1), "amount_cents": 1500}

    def test_the_same_line_as_loguru_writes(self, json_logs: Logs) -> None:
        log_money("PaymentCharged", f"00-{'a' * 32}-{'b' * 16}-01", **self.FIELDS)
        logger.bind(**self.FIELDS, trace_id="a" * 32).info("PaymentCharged")
        first, second = json_logs.text().splitlines()
        times = [json.loads(line)["time"] for line in (first, second)]
        assert first.replace(times[0], "") == second.replace(times[1], "")
        assert len(times[0]) == len(times[1])

    def test_the_level_is_a_threshold_for_it_too(self, logs: Logs) -> None:
        set_up_logs("json", "WARNING")
        log_money("PaymentCharged", None, **self.FIELDS)
        assert logs.text() == ""

    def test_as_text_it_is_loguru_s(self, logs: Logs) -> None:
        set_up_logs("json", "INFO")
        set_up_logs("text", "INFO")
        log_money("PaymentCharged", None, **self.FIELDS)
        (line,) = logs.text().splitlines()
        assert "INFO     PaymentCharged" in line
        assert "1500" in line

    def test_they_keep_their_order(self, json_logs: Logs) -> None:
        for number in range(4):
            logger.info(str(number)) if number % 2 else log_money(str(number), None)
        assert [line["message"] for line in json_logs.lines()] == ["0", "1", "2", "3"]


class Pipe:
    """stderr of a process is a pipe, and whoever reads it may be slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self._rest = b""
        monkeypatch.setattr(sys, "stderr", os.fdopen(self.writing, "w", closefd=False))

    def read_all(self) -> list[dict[str, Any]]:
        """The lines that are complete by now."""
        with suppress(BlockingIOError):
            while part := os.read(self.reading, 1 << 20):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


def blocked(*_: object) -> int:
    raise BlockingIOError


@pytest.fixture
def pipe(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    opened = Pipe(monkeypatch)
    set_up_logs("json", "INFO")
    yield opened
    logger.remove()
    opened.close()


class TestWhenNobodyReads:
    @pytest.mark.anyio
    async def test_lines_wait_and_keep_their_order(self, pipe: Pipe) -> None:
        for number in range(2000):  # some 200 kB; a pipe takes 64
            logger.bind(number=number).info("x" * 50)
        read: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(read) < 2000:
                read += [line["number"] for line in pipe.read_all()]
                await asyncio.sleep(0.01)
        assert read == list(range(2000))

    @pytest.mark.anyio
    async def test_a_long_line_arrives_whole(self, pipe: Pipe) -> None:
        logger.info("y" * 300_000)
        lines: list[dict[str, Any]] = []
        async with asyncio.timeout(PATIENCE_S):
            while not lines:
                lines = pipe.read_all()
                await asyncio.sleep(0.01)
        assert lines[0]["message"] == "y" * 300_000

    @pytest.mark.anyio
    async def test_what_is_too_much_is_dropped_and_counted(
        self, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("payments.observability.logs.BUFFER_MAX", 100_000)
        for number in range(3000):
            logger.bind(number=number).info("z" * 50)
        lines: list[dict[str, Any]] = []
        async with asyncio.timeout(PATIENCE_S):
            while not (lines and "lines" in lines[-1]):
                lines += pipe.read_all()
                await asyncio.sleep(0.01)
        *written, told = lines
        assert told["message"] == "log lines were dropped: the log was not read"
        assert told["level"] == "WARNING"
        assert [line["number"] for line in written] == list(range(len(written)))
        assert len(written) + told["lines"] == 3000
        logger.info("after")
        assert [line["message"] for line in pipe.read_all()] == ["after"]

    def test_without_a_loop_the_next_line_takes_them_along(self, pipe: Pipe) -> None:
        for number in range(2000):
            logger.bind(number=number).info("x" * 50)
        lines: list[dict[str, Any]] = []
        for _ in range(50):
            lines += pipe.read_all()
            logger.bind(number=-1).info("next")
        read = [line["number"] for line in lines if line["number"] >= 0]
        assert read == list(range(2000))

    @pytest.mark.anyio
    async def test_a_pipe_that_another_process_fills_loses_nothing(self, pipe: Pipe) -> None:
        """Its descriptor may be in non-blocking mode, which all who have the pipe share."""
        os.set_blocking(pipe.writing, False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("payments.observability.logs.os.write", blocked)
            logger.bind(number=1).info("first")
            logger.bind(number=2).info("second")
        async with asyncio.timeout(PATIENCE_S):
            lines: list[dict[str, Any]] = []
            while len(lines) < 2:
                lines += pipe.read_all()
                await asyncio.sleep(0.01)
        assert [line["number"] for line in lines] == [1, 2]

    def test_nobody_left_to_read_is_no_error(self, pipe: Pipe) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, pipe.reading)  # closes the pipe's reading end
        os.close(null)
        for _ in range(3):
            logger.info("to nobody")


TALKATIVE = """
from loguru import logger
from payments.observability.logs import set_up_logs
set_up_logs("json", "INFO")
for number in range(2000):
    logger.bind(number=number).info("x" * 50)
"""


def test_the_last_lines_are_written_at_the_end_of_the_process() -> None:
    """However slow the reader: here it begins after the process was to end."""
    process = subprocess.Popen([sys.executable, "-c", TALKATIVE], stderr=subprocess.PIPE)
    time.sleep(0.7)
    _, text = process.communicate(timeout=20)
    assert [json.loads(line)["number"] for line in text.splitlines()] == list(range(2000))


def test_a_reader_that_never_comes_does_not_keep_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", TALKATIVE], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=15) == 0
        finally:
            process.kill()


FORGED = '\n{"level":"CRITICAL","message":"forged"}\n'


def test_a_service_s_log_is_lines_of_json_without_secrets(
    tmp_path: Path, address: DatabaseAddress
) -> None:
    """Whatever clients send, and with every secret set."""
    key, token = f"{CANARY}-key", f"{CANARY}-path"
    signing = base64.b64encode(f"{CANARY}-signing-secret".encode()).decode()
    secrets = (CANARY, signing, hashlib.sha256(key.encode()).hexdigest())
    settings: dict[str, object] = {
        **at(address),
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": "json",
        "PAYMENTS_API_KEYS": f"orders:{secrets[2]}",
        "ORDER_CALLBACK_URL": f"http://127.0.0.1:{free_port()}/{token}",
        "ORDER_CALLBACK_SECRET": f"whsec_{signing}",
        "DATABASE_PASSWORD": f"{CANARY}-password",
        "SIMULATED_FAULTS": "charge:down*1",
    }
    with ServiceProcess(tmp_path, **settings) as service, httpx.Client() as client:
        client.headers["Authorization"] = f"Bearer {key}"
        statuses = [
            service.charge(client, f"{CANARY}-{number}", payment_method=f"tok_{CANARY}").status_code
            for number in range(5)
        ]
        assert 201 in statuses
        service.charge(client, f"{CANARY}-bad", merchant_order_id=f"{CANARY}{FORGED}")
        client.get(f"{service.url}/v1/payments/{CANARY}{quote(FORGED)}")
        client.get(f"{service.url}/{CANARY}{quote(FORGED)}?key={CANARY}")
        client.get(f"{service.url}/v1/payments", headers={"Authorization": f"Bearer {CANARY}"})
        client.request(f"{CANARY}", f"{service.url}/v1/payments")
        with socket.create_connection(("127.0.0.1", service.port)) as raw:
            raw.sendall(f"GET /{CANARY} HTTP/1.1\nX: {FORGED}".encode() + b"\0\r\n\r\n")
            raw.recv(1000)
        rejected = "requests were rejected: not valid HTTP, or above a limit"
        eventually(lambda: rejected in service.log.read_text())
        assert service.terminate() == 0
    text, lines = service.log.read_text(), lines_of(service)
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert not [line for line in lines if "forged" in line["message"]]
    for secret in secrets:
        assert secret not in text
    messages = Counter(line["message"] for line in lines)
    assert messages["PaymentCharged"] == statuses.count(201)
    assert messages[rejected] == 1
    by_level = Counter(line["level"] for line in lines)
    assert by_level["CRITICAL"] == by_level["ERROR"] == 0


def lines_of(service: ServiceProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.log.read_text().splitlines()]


def test_a_pipelined_request_does_not_inherit_the_trace_of_the_one_before(
    tmp_path: Path, address: DatabaseAddress
) -> None:
    head = "GET /v1/payments HTTP/1.1\r\nHost: x\r\n"
    traced = f"{head}traceparent: 00-{'a' * 32}-{'b' * 16}-01\r\n\r\n"
    with ServiceProcess(tmp_path, **at(address)) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as raw:
            raw.sendall(f"{traced}{head}Connection: close\r\n\r\n".encode())
            while raw.recv(65536):
                pass
        assert service.terminate() == 0
    found = [line for line in lines_of(service) if line["message"] == "GET /v1/payments 200"]
    assert [line.get("trace_id") for line in found] == ["a" * 32, None]
    assert len({line["request_id"] for line in found}) == 2


def test_what_is_refused_at_the_door_is_counted(tmp_path: Path, address: DatabaseAddress) -> None:
    limits = {"INTENT_QUEUE_MAX": 1, "GATEWAY_CONCURRENCY_MAX": 1}
    with ServiceProcess(tmp_path, **at(address), **limits) as service:
        with ThreadPoolExecutor(32) as threads, httpx.Client(timeout=20) as client:
            asked = threads.map(lambda _: client.get(f"{service.url}/v1/payments"), range(320))
            statuses = Counter(answer.status_code for answer in asked)
        text = httpx.get(f"{service.url}/metrics").text
        (refused,) = re.findall(r"^http_requests_refused_total (\S+)$", text, re.MULTILINE)
        tally = re.compile(r'in progress".*"requests":(\d+)')
        eventually(lambda: sum(map(int, tally.findall(service.log.read_text()))) >= float(refused))
        assert service.terminate() == 0
    told = [line for line in lines_of(service) if line["message"].endswith("in progress")]
    assert sum(line["requests"] for line in told) == float(refused) > 0
    assert {line["level"] for line in told} == {"WARNING"}
    assert len(told) < statuses[503]


def test_a_service_whose_log_nobody_reads_goes_on(tmp_path: Path, address: DatabaseAddress) -> None:
    port = free_port()
    settings = {**at(address), "PORT": port, "ACCESS_LOG_PER_S": 1_000_000}
    with subprocess.Popen(
        [*PAYMENTS, "serve"],
        env=environment(PAYMENTS_DATA_DIR=tmp_path, **settings),
        stderr=subprocess.PIPE,
    ) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
                until_answered(client)
                for _ in range(600):  # some 140 kB; a pipe takes 64
                    assert client.get("/v1/payments").status_code == 200
            process.terminate()
            _, text = process.communicate(timeout=15)
        finally:
            process.kill()
    lines = [json.loads(line) for line in text.splitlines()]
    assert Counter(line["message"] for line in lines)["GET /v1/payments 200"] == 600
    assert lines[-1]["message"] == "stopped"


def until_answered(client: httpx.Client) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            client.get("/health/live")
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return
