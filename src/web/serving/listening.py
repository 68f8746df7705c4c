"""The listening socket, and uvicorn's server on it."""

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
ACCEPTS_MAX = 512  # connections accepted in one iteration of the event loop: about 15 ms
ACCEPT_PAUSE_S = 0.1
UNSENT_MAX = 128 * 1024  # unsent bytes of responses in the kernel, for one connection


def bind(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything else is started; raises StartError."""
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
        # Connections inherit it: a response in two parts does not wait for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # All further unread bytes stay in our buffer, so that WriteWatch sees whether the
            # client reads: otherwise the kernel takes them in steps of a megabyte.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_MAX)
        listener.setblocking(False)
        listener.bind(info[4])
        listener.listen(BACKLOG)  # now, so that a second process fails to start
    except (OSError, UnicodeError) as error:
        place = f"HOST {host!r} and {variable} {port}"
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {place}: {reason}") from None
    return listener


def allow_many_connections() -> None:
    """Raises the limit of open files to the system's maximum. A login shell's usual 1,024 would be
    the first limit that is reached."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server(uvicorn.Server):
    """uvicorn's server, with our own accept loop.

    uvloop accepts one connection per iteration (seen with 0.23, libuv 1.52). Under load an
    iteration takes 25 ms, so new connections would wait for seconds, outside of all our limits.
    Once BACKLOG connections wait, the kernel drops new ones, and their clients retry after 1 s.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()  # connections are accepted
        self._connecting: set[asyncio.Task[Any]] = set()
        self._repeats = Repeats()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Disables uvicorn's signal handlers, which would end the process before the charges are
        finished."""
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
            except OSError as error:  # no file descriptor is free: wait until one is closed
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
