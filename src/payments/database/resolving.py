"""Resolves host names without blocking the event loop or the end of the process."""

import asyncio
import concurrent.futures
import socket
import threading
from contextlib import suppress


async def addresses_of(host: str, timeout_s: float) -> list[str]:
    """The addresses of a name, or an address itself. Raises OSError, TimeoutError after
    `timeout_s`.

    Runs in its own thread, which is abandoned after the timeout. The event loop has few threads for
    this; if they hang, they block further lookups and the end of the process.
    """
    found: concurrent.futures.Future[list[str]] = concurrent.futures.Future()

    def look_up() -> None:
        with suppress(concurrent.futures.InvalidStateError):  # the waiter has timed out
            try:
                infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except OSError as error:
                found.set_exception(error)
            except UnicodeError:
                found.set_exception(OSError("not a host name"))
            else:
                found.set_result([str(info[4][0]) for info in infos])

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await asyncio.wrap_future(found)
