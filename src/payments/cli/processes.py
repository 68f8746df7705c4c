"""The commands that run the service: `serve` and `work`."""

import asyncio
import importlib
import os
import signal
import socket
import sys
from typing import Literal

import click
import uvloop
from loguru import logger

from payments.cli.greeting import greeting
from payments.cli.start import begin
from payments.gateways.building import build_gateways
from payments.observability.tracing import traces
from payments.opening import heads_dir, open_database
from payments.service import Service, starting, stop_signals

WORK_STOP_S = 8.0  # container runtimes kill after 10 s


def _end_on_signals() -> None:
    """Makes stop signals end the start-up in order, until an event loop handles them. SIGINT does
    so by default."""
    for signum in set(stop_signals()) - {signal.SIGINT}:
        signal.signal(signum, lambda *_: sys.exit(0))


@click.command()
@click.option(
    "--api-only", is_flag=True, help="Leave read models, settling and callbacks to `payments work`."
)
@click.option("--examples", is_flag=True, help="Print example requests once the service listens.")
def serve(api_only: bool, examples: bool) -> None:
    """Start the service and run until SIGTERM."""
    _end_on_signals()
    settings = begin(told=True)
    # By name, since payments must not import web.
    server = importlib.import_module("web.serving.server")
    listening = importlib.import_module("web.serving.listening")
    listener, metrics = listening.bind(settings), listening.bind_metrics(settings)
    gateways = build_gateways(settings)
    to: Literal["migrate", "run"] = "migrate" if settings.migrate_on_start else "run"
    with traces(os.environ), open_database(settings, to=to, lasting=True) as address:

        def greet() -> None:
            if examples:
                click.echo(greeting(settings, address), err=True)

        server.run(
            *(settings, address, gateways, listener, metrics),
            work=not api_only,
            on_listening=greet,
        )


@click.command()
def work() -> None:
    """Follow the log, settle payments and send callbacks until SIGTERM, without the API.

    With METRICS_PORT it serves /metrics and /health on that port.
    """
    _end_on_signals()
    settings = begin(told=True)
    metrics = importlib.import_module("web.serving.listening").bind_metrics(settings)
    gateways = build_gateways(settings)

    async def run() -> None:
        with starting():
            service = Service(settings, address, gateways=gateways, data_dir=heads_dir(settings))
        await _work(service, metrics)

    to: Literal["migrate", "run"] = "migrate" if settings.migrate_on_start else "run"
    with traces(os.environ), open_database(settings, to=to, lasting=True) as address:
        uvloop.run(run())


async def _work(service: Service, metrics: socket.socket | None) -> None:
    stopping = asyncio.Event()
    for signum in stop_signals():
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    try:
        with starting():
            await service.start()
        async with importlib.import_module("web.serving.server").operations_port(service, metrics):
            logger.info("working")
            await stopping.wait()
        logger.info("stopping")
    finally:
        await service.stop(WORK_STOP_S)
    logger.info("stopped")
