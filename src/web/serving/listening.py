"""Where connections come in: the listening socket, and uvicorn's server on it."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from payments.errors import StartError
from payments.observability.logs import Repeats
from payments.settings import Settings

BACKLOG = 2048  # connections that may wait to be accepted
ACCEPTS_MAX = 512  # in one turn of the loop: about 15 ms
ACCEPT_PAUSE_S = 0.1
UNSENT_MAX = 128 * 1024  # bytes of answers that the kernel keeps for a connection


def bind(settings: Settings) -> socket.socket:
    """The listening socket, bound first of all; raises StartError."""
    return _bind(settings.host, "PORT", settings.port)


def bind_metrics(settings: Settings) -> socket.socket | None:
    """The same for METRICS_PORT; None if that is not set."""
    if settings.metrics_port is None:
        return None
    return _bind(settings.host, "METRICS_PORT", settings.metrics_port)


def _bind(host: str, variable: str, port: int) -> socket.socket:
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(info[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: an answer in two parts does not wait for the client's kernel.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # What a client has not taken stays with us but for this, and so does the knowledge of
            # whether it takes anything: the kernel would report that in steps of a megabyte.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_MAX)
        listener.setblocking(False)
        listener.bind(info[4])
        listener.listen(BACKLOG)  # now, so that a second start notices
    except (OSError, UnicodeError) as error:
        place = f"HOST {host!r} and {variable} {port}"
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {place}: {reason}") from None
    return listener


def allow_many_connections() -> None:
    """As many as the system lets us have: a login shell's usual 1,024 would be the first bound."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server(uvicorn.Server):
    """uvicorn's server, which accepts connections by itself.

    uvloop's accepts one connection per turn of the loop (seen with 0.23, libuv 1.52). Under load a
    turn takes 25 ms, so new connections would wait for seconds, outside of every bound of ours; and
    once BACKLOG of them wait, the kernel drops the next, and their clients try again after 1 s.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()  # connections are accepted
        self._connecting: set[asyncio.Task[Any]] = set()
        self._repeats = Repeats()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would end the process before the charges are finished."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        for listener in sockets or []:
            self._watch(listener)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            asyncio.get_running_loop().remove_reader(listener)
        await super().shutdown(sockets)

    def _watch(self, listener: socket.socket) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_MAX):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no file is left: first one of those that are open must end
                reason = error.strerror
                self._repeats.tell("WARNING", "cannot accept connections", of=reason, reason=reason)
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_PAUSE_S, self._watch, listener)
                return
            connection.setblocking(False)
            task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
