"""uvicorn in our own process: one event loop, one ordered shutdown.

On SIGTERM, SIGINT or SIGHUP the process accepts no new connections, responds to the requests in
progress, finishes charges that continue after their response, writes the waiting appends, and exits
with 0: all within STOP_S, since container runtimes kill after 10 s.
"""

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import uvicorn
import uvloop
from litestar import Litestar
from loguru import logger

from payments.database.connections import DatabaseAddress
from payments.gateways import Gateway
from payments.opening import heads_dir
from payments.service import Service, starting, stop_signals
from payments.settings import Settings
from web.app import application, door, guarded, operations_application
from web.serving.listening import Server, allow_many_connections
from web.serving.protocol import Protocol

STOP_S = 9.0
CHARGES_STOP_S = 6.5  # every charge has its response by then, PENDING if necessary
REQUESTS_STOP_S = 7  # then uvicorn cancels the remaining requests
# Longer than load balancers keep an idle connection, most of them 60 s: the side that sends
# requests must close first, or a request that is just being sent is lost.
KEEP_ALIVE_S = 75


def run(
    settings: Settings,
    address: DatabaseAddress,
    gateways: Sequence[Gateway],
    listener: socket.socket,
    metrics_listener: socket.socket | None = None,
    *,
    work: bool = True,
    on_listening: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP. Raises StartError."""

    async def main() -> None:
        with starting():
            service = Service(settings, address, gateways=gateways, data_dir=heads_dir(settings))
        await serve(service, listener, metrics_listener, work=work, on_listening=on_listening)

    allow_many_connections()
    uvloop.run(main())


async def serve(
    service: Service,
    listener: socket.socket,
    metrics_listener: socket.socket | None = None,
    *,
    work: bool = True,
    on_listening: Callable[[], None] = lambda: None,
) -> None:
    """Starts the service, serves requests, and stops everything in order.

    Without `work` another process follows the log, settles and sends callbacks. Raises StartError.
    """
    if not service.settings.payments_api_keys:
        logger.warning("PAYMENTS_API_KEYS is not set: any client that reaches the port may charge")
    stop_by = time.monotonic() + STOP_S
    try:
        with starting():
            await service.start(work=work)
            service.telemetry.role.labels("api").set(1)
            server = _server(service, application(service))

        def stop() -> None:
            nonlocal stop_by
            if not server.should_exit:
                server.should_exit = True
                stop_by = time.monotonic() + STOP_S
                service.runs.answer_all_within(CHARGES_STOP_S)
                service.finish()
                logger.info("stopping")

        for signum in stop_signals():
            asyncio.get_running_loop().add_signal_handler(signum, stop)
        _tame_garbage_collection()
        async with operations_port(service, metrics_listener):
            serving = await _listen(server, listener)
            host, port = listener.getsockname()[:2]
            logger.bind(host=host, port=port).info("listening")
            on_listening()
            await serving
    finally:
        await service.stop(max(1.0, stop_by - time.monotonic() - 0.5))
    logger.info("stopped")


@asynccontextmanager
async def operations_port(service: Service, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serves /health and /metrics on METRICS_PORT until the end of the block, so that the shutdown
    can be observed too. Without a listener it does nothing. Raises StartError.
    """
    if listener is None:
        yield
        return
    with starting():
        server = _server(service, operations_application(service))
    serving = await _listen(server, listener)
    port = listener.getsockname()[1]
    logger.bind(port=port).info("metrics are served on a separate port")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=1)


async def _listen(server: Server, listener: socket.socket) -> asyncio.Task[None]:
    """Returns the serving task once connections are accepted; raises StartError."""
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="serving")
    listening = asyncio.create_task(server.listening.wait())
    with starting():
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if serving.done():
            serving.result()
    return serving


def _server(service: Service, app: Litestar) -> Server:
    protocol = partial(Protocol, door(app, service))
    return Server(
        uvicorn.Config(
            guarded(app, service),
            loop="uvloop",
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            workers=1,  # else uvicorn parses WEB_CONCURRENCY, which may not be a number
            access_log=False,
            server_header=False,
            proxy_headers=False,
            reset_contextvars=True,  # a request must not inherit the previous one's log context
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=REQUESTS_STOP_S,
        )
    )


def _tame_garbage_collection() -> None:
    """Freezes the objects that live as long as the process.

    Otherwise every full collection visits all modules and their code: a pause of about 30 ms,
    several times a second under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
