"""A client that sends any bytes and reads every answer strictly: HTTP/1.1 on a plain socket."""

import json
import re
import socket
import struct
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

ANSWER_TIMEOUT_S = 15.0

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) ([\t -~]*)")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9a-z-]+): ([!-~](?:[\t -~]*[!-~])?)?")


class NotHttp(AssertionError):
    """What came back is not an answer of HTTP/1.1."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case; none comes twice
    body: bytes

    @property
    def is_last(self) -> bool:
        """Whether the server said that it closes the connection."""
        return self.headers.get("connection") == "close"

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection; every wait on it is bounded by `timeout_s`, after which TimeoutError."""

    def __init__(self, port: int, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, *parts: bytes, pause_s: float = 0) -> None:
        """The parts one after another. That the server no longer reads is no error: it may refuse
        a request before the end, and its answer is still to be read."""
        try:
            for number, part in enumerate(parts):
                if number:
                    time.sleep(pause_s)
                self._socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def half_close(self) -> None:
        """No more will be sent; answers are still read."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:  # the server has closed already
            if error.errno != 107:
                raise

    def reset(self) -> None:
        """Gone without a word: the server sees a reset, not an end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def answer(self, *, to_head: bool = False) -> Answer | None:
        """The next answer, interim ones (1xx) included, or None if the connection ended before its
        first byte. The answer `to_head`, a HEAD request, has no body whatever its length says."""
        while b"\r\n\r\n" not in self._received:
            if not self._receive():
                if self._received:
                    raise NotHttp(f"ended in the middle of a head: {self._received[:200]!r}")
                return None
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status, headers = _parse_head(head)
        if status < 200 or status in (204, 304) or to_head:
            return Answer(status, headers, b"")
        if "content-length" not in headers or "transfer-encoding" in headers:
            raise NotHttp(f"without a length: {head!r}")
        length = int(headers["content-length"])
        while len(self._received) < length:
            if not self._receive():
                raise NotHttp(f"ended after {len(self._received)} of {length} bytes of body")
        body, self._received = self._received[:length], self._received[length:]
        return Answer(status, headers, body)

    def answers(self) -> list[Answer]:
        """All answers until the server closes."""
        found = []
        while (answer := self.answer()) is not None:
            found.append(answer)
        return found

    def _receive(self) -> bool:
        """False at the end of the connection, an abrupt one included."""
        try:
            chunk = self._socket.recv(65536)
        except ConnectionResetError:
            chunk = b""
        self._received += chunk
        return bool(chunk)


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.split(b"\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise NotHttp(f"not a status line: {first!r}")
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise NotHttp(f"not a header: {line!r}")
        name = header[1].decode()
        if name in headers:
            raise NotHttp(f"header twice: {name}")
        headers[name] = (header[2] or b"").decode()
    return int(status[1]), headers


def code_of(answer: Answer) -> str:
    """The problem's code, "" for an answer that is none; its form is checked (RFC 9457)."""
    if answer.status < 400:
        assert answer.headers.get("content-type") != "application/problem+json"
        return ""
    assert answer.headers["content-type"] == "application/problem+json", answer
    problem = answer.json()
    assert problem["status"] == answer.status
    assert problem["type"] == f"urn:payments:problem:{problem['code']}"
    assert problem["title"]
    assert problem["detail"]
    return str(problem["code"])


def said(answer: Answer) -> str:
    words = [str(answer.status), code_of(answer), "closed" if answer.is_last else ""]
    return " ".join(filter(None, words))
