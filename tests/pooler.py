"""A pooler in front of the test server, as PgBouncer is: it gives a few server connections to many
clients, each for a transaction or for as long as the client is connected.
"""

import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

import msgspec

from payments.database.connections import DatabaseAddress

KNOWN_PARAMETERS = {"user", "database", "application_name", "client_encoding"}
WAIT_S = 10.0
IDLE = b"I"  # what ReadyForQuery says outside a transaction


class _End:
    """One end of a connection, message by message."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self._stream = opened.makefile("rb")

    def startup(self) -> dict[str, str]:
        (length,) = struct.unpack("!I", self._exactly(4))
        words = self._exactly(length - 4)[4:].decode().split("\0")
        return dict(zip(words[::2], words[1::2], strict=False))

    def read(self) -> tuple[bytes, bytes]:
        """A message: its kind, and all of it."""
        head = self._exactly(5)
        (length,) = struct.unpack("!I", head[1:])
        return head[:1], head + self._exactly(length - 4)

    def until_ready(self) -> Iterator[tuple[bytes, bytes]]:
        kind = b""
        while kind != b"Z":
            kind, message = self.read()
            yield kind, message

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._stream.close()
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except ValueError:  # closed by another thread
            data = b""
        if len(data) < size:
            raise EOFError
        return data


def _message(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return kind + struct.pack("!I", len(body) + 4) + body


class Pooler:
    """Listens on a socket of its own; `address` leads through it.

    `resets`: when a server connection is forgotten what was set on it ("never": it is handed on as
    it was left). `ignores`: startup parameters that it drops; other unknown ones it refuses.
    """

    def __init__(
        self,
        server: DatabaseAddress,
        mode: Literal["session", "transaction"] = "session",
        *,
        size: int = 20,
        resets: Literal["never", "session", "transaction"] = "session",
        in_turn: bool = False,
        ignores: frozenset[str] = frozenset(),
    ) -> None:
        self._server = server
        self._mode = mode
        self._resets = resets
        self._next = 0 if in_turn else -1
        self._ignores = ignores
        self._directory = Path(tempfile.mkdtemp(prefix="pooler-"))
        self.address = msgspec.structs.replace(server, host=str(self._directory))
        self._free = threading.BoundedSemaphore(size)
        self._idle: list[_End] = []
        self._opened: list[_End] = []
        self._told = b""  # what the server says of itself

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / f".s.PGSQL.{self.address.port}"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._opened:
            end.close()
        shutil.rmtree(self._directory)

    def wait_until_idle(self, connections: int) -> None:
        """Until so many server connections belong to nobody."""
        deadline = time.monotonic() + WAIT_S
        while len(self._idle) < connections:
            assert time.monotonic() < deadline, f"{len(self._idle)} connections are idle"
            time.sleep(0.01)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = _End(self._listener.accept()[0])
                self._opened.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: _End) -> None:
        with suppress(OSError, EOFError):
            unknown = client.startup().keys() - KNOWN_PARAMETERS - self._ignores - {""}
            if unknown:
                text = f"unsupported startup parameter: {unknown.pop()}"
                fields = b"SFATAL\0", b"VFATAL\0", b"C08P01\0", f"M{text}\0".encode(), b"\0"
                client.send(_message(b"E", *fields))
            else:
                self._welcome(client)
                while self._pass_on(client):
                    pass
        client.close()

    def _welcome(self, client: _End) -> None:
        if not self._told:
            self._give_back(self._take(), "never")
        key = _message(b"K", struct.pack("!II", 0x7FFFFFFF, 1))
        client.send(_message(b"R", struct.pack("!I", 0)) + self._told + key + _message(b"Z", IDLE))

    def _pass_on(self, client: _End) -> bool:
        """A transaction, or all that the client ever asks; whether there may be more."""
        kind, message = client.read()
        if kind == b"X":
            return False
        server, status = self._take(), b""
        try:
            while self._mode == "session" or status != IDLE:
                server.send(message)
                if kind in (b"Q", b"S"):
                    for said, answer in server.until_ready():
                        client.send(answer)
                        status = answer[-1:] if said == b"Z" else b""
                if status == IDLE and self._mode == "transaction":
                    break
                kind, message = client.read()
                if kind == b"X":
                    return False
        finally:
            self._give_back(server, self._mode)
        return True

    def _take(self) -> _End:
        if not self._free.acquire(timeout=WAIT_S):
            raise EOFError
        return self._idle.pop(self._next) if self._idle else self._open()

    def _give_back(self, server: _End, after: Literal["never", "session", "transaction"]) -> None:
        if after != "never" and self._resets == after:
            self._ask(server, "DISCARD ALL")
        self._idle.append(server)
        self._free.release()

    def _open(self) -> _End:
        opened = socket.socket(socket.AF_UNIX)
        opened.connect(f"{self._server.host}/.s.PGSQL.{self._server.port}")
        server = _End(opened)
        self._opened.append(server)
        words = f"user\0{self._server.user}\0database\0{self._server.dbname}\0\0".encode()
        server.send(struct.pack("!II", len(words) + 8, 3 << 16) + words)
        told = [message for kind, message in server.until_ready() if kind == b"S"]
        self._told = b"".join(told)
        return server

    @staticmethod
    def _ask(server: _End, query: str) -> None:
        server.send(_message(b"Q", query.encode(), b"\0"))
        for _ in server.until_ready():
            pass
