"""How connections end: half closed, idle, never read, gone."""

import http.client
from collections.abc import Callable

import psutil
import pytest

from tests.edge.raw import Connection, said
from tests.edge.requests import BODY, LAST_CHUNK, charge, chunk, chunked, get
from tests.machine import within
from tests.process import ServiceProcess
from tests.support import eventually

CUT_SHORT = "400 malformed_request"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (charge, ["201"]),
        (lambda: charge() + charge(), ["201", "201"]),
        (lambda: get(b"/v1/payments"), ["200"]),
        (lambda: charge(b"{}"), ["400 invalid_request"]),
        (lambda: chunked(chunk(BODY) + LAST_CHUNK), ["201"]),
        (lambda: b"", []),
        (lambda: charge()[:30], [CUT_SHORT]),
        (lambda: charge()[:-1], [CUT_SHORT]),
        (lambda: chunked(chunk(BODY)), [CUT_SHORT]),
        (lambda: charge() + charge()[:30], ["201", CUT_SHORT]),
        (lambda: charge() + charge()[:-1], ["201", CUT_SHORT]),
    ],
)
def test_a_client_that_will_send_no_more_gets_its_answers(
    edge: ServiceProcess, sent: Callable[[], bytes], expected: list[str]
) -> None:
    """Like `printf … | nc -N`: the end of what is sent comes before the answer."""
    with within(2):
        with Connection(edge.port) as connection:
            connection.send(sent())
            connection.half_close()
            heard = [said(answer).removesuffix(" closed") for answer in connection.answers()]
        assert heard == expected


def test_clients_that_are_gone_leave_nothing_behind(edge: ServiceProcess) -> None:
    """In the middle of a charge, of several, or of a body; the log is checked by the fixture."""
    process = psutil.Process(edge.process.pid)
    before = process.num_fds()
    for sent in [charge(), charge() * 5, charge()[:-1], charge() + charge()[:-1]] * 20:
        connection = Connection(edge.port)
        connection.send(sent)
        connection.reset()
    with within(5):  # its pool of database connections may have grown
        eventually(lambda: process.num_fds() <= before + 8)


def test_a_client_that_sends_far_too_much_sees_why_it_is_refused(edge: ServiceProcess) -> None:
    """It is still sending when it is refused: a reset would come instead of the answer."""
    for _ in range(5):
        client = http.client.HTTPConnection("127.0.0.1", edge.port, timeout=10)
        client.request("POST", "/v1/charge", bytes(3_000_000), {"Content-Type": "text/plain"})
        assert client.getresponse().status == 413
        client.close()


def test_a_head_behind_large_requests_is_not_taken_for_a_large_one(edge: ServiceProcess) -> None:
    with Connection(edge.port) as connection:
        connection.send(charge(bytes(15_000)) * 8 + get()[:20], get()[20:], pause_s=0.3)
        statuses = [answer.status for _ in range(9) if (answer := connection.answer())]
    assert statuses == [400] * 8 + [200]
