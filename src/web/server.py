"""uvicorn inside our own process: one event loop, one ordered shutdown.

On SIGTERM or SIGINT: no new connections, requests in flight are answered, charges that go on
behind them are finished, what waits for the store is written, and the process ends with 0. All of
it within STOP_S, since container runtimes kill after 10 s.
"""

import asyncio
import gc
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import uvicorn
import uvloop
from litestar import Litestar
from loguru import logger

from payments.database import DatabaseAddress
from payments.gateways import Gateway
from payments.opening import heads_dir
from payments.service import Service
from payments.settings import Settings
from web.app import application, door, guarded, operations_application
from web.listening import Server, allow_many_connections
from web.protocol import Protocol

STOP_S = 9.0
CHARGES_STOP_S = 6.5  # every charge is answered by then, PENDING if need be
REQUESTS_STOP_S = 7  # then uvicorn cancels what is left
KEEP_ALIVE_S = 30  # longer than the pauses of a busy client's connection pool


def run(
    settings: Settings,
    address: DatabaseAddress,
    gateway: Gateway,
    listener: socket.socket,
    metrics_listener: socket.socket | None = None,
    *,
    work: bool = True,
) -> None:
    """Serves until SIGTERM or SIGINT."""

    async def main() -> None:
        service = Service(settings, address, gateway=gateway, data_dir=heads_dir(settings))
        await serve(service, listener, metrics_listener, work=work)

    allow_many_connections()
    uvloop.run(main())


async def serve(
    service: Service,
    listener: socket.socket,
    metrics_listener: socket.socket | None = None,
    *,
    work: bool = True,
) -> None:
    """Starts the service, answers requests, and stops everything in order.

    Without `work` another process follows the log, settles and calls back.
    """
    if not service.settings.payments_api_keys:
        logger.warning("PAYMENTS_API_KEYS is not set: whoever reaches the port may charge")
    await service.start(work=work)
    service.telemetry.role.labels("api").set(1)
    server = _server(service, application(service))
    stop_by = time.monotonic() + STOP_S

    def stop() -> None:
        nonlocal stop_by
        if not server.should_exit:
            server.should_exit = True
            stop_by = time.monotonic() + STOP_S
            service.runs.hurry(CHARGES_STOP_S)
            service.finish()
            logger.info("stopping")

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    _tame_garbage_collection()
    host, port = listener.getsockname()[:2]
    logger.bind(host=host, port=port).info("listening")
    try:
        async with operations_port(service, metrics_listener):
            await server.serve(sockets=[listener])
    finally:
        await service.stop(max(1.0, stop_by - time.monotonic() - 0.5))
    logger.info("stopped")


@asynccontextmanager
async def operations_port(service: Service, listener: socket.socket | None) -> AsyncIterator[None]:
    """Answers /health and /metrics on METRICS_PORT meanwhile; without a listener it does nothing.

    Until the end of the block, so that the last minutes of a process can be looked at as well.
    """
    if listener is None:
        yield
        return
    server = _server(service, operations_application(service))
    port = listener.getsockname()[1]
    logger.bind(port=port).info("metrics have a port of their own")
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="metrics port")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=1)


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
            access_log=False,
            server_header=False,
            proxy_headers=False,
            reset_contextvars=True,  # a request must not inherit the log context of the one before
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=REQUESTS_STOP_S,
        )
    )


def _tame_garbage_collection() -> None:
    """Takes what lives as long as the process out of the collector's sight.

    Otherwise every full collection walks all modules and their code: about 30 ms in which nothing
    is answered, several times a second under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
