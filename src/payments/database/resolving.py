"""Host names: looked up without holding up the event loop, or the end of the process."""

import asyncio
import concurrent.futures
import socket
import threading
from contextlib import suppress


async def addresses_of(host: str, timeout_s: float) -> list[str]:
    """The addresses of a name, or of an address itself; OSError, TimeoutError if it takes longer.

    In a thread of its own, which is left alone if it takes longer. The event loop has four for
    this: hanging, they would keep the next attempts waiting, and the process from ending.
    """
    found: concurrent.futures.Future[list[str]] = concurrent.futures.Future()

    def look_up() -> None:
        with suppress(concurrent.futures.InvalidStateError):  # nobody waits any more
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
