"""The Litestar application on a Service."""

from functools import partial

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp

from payments.errors import PaymentsError, TooBusy
from payments.observability.metrics import Telemetry
from payments.service import Service
from payments.single_flight import Recent
from web.charges import charge
from web.exception_handlers import on_exception, on_http_exception, on_payments_error
from web.operations import ALIVE, HEALTH_AGE_S, health, health_of, live, metrics
from web.paths import WEBHOOK, Paths
from web.payments import callbacks, events, payment, payments
from web.provider_webhooks import provider_webhook
from web.refunds import refund
from web.schema import document as openapi
from web.schema.page import docs, root
from web.serving.door import Door
from web.serving.guard import Guard
from web.unfulfilled import unfulfilled

v1 = Router(
    "/v1",
    route_handlers=[
        *(charge, refund, payments, payment, events, callbacks, unfulfilled, provider_webhook)
    ],
)


def application(service: Service) -> Litestar:
    """The endpoints and their description. The caller must start the service."""
    app = _litestar(service, v1)
    app.state.openapi = openapi.document(app)
    _expect_requests(app, service.telemetry)
    app.register(docs)  # afterwards: it does not describe itself
    app.register(root)
    return app


def _expect_requests(app: Litestar, telemetry: Telemetry) -> None:
    """Creates the counters of all documented responses at 0. Prometheus would otherwise not see the
    first error as an increase."""
    for path, method, _, operation in openapi.endpoints(app):
        statuses = {500, *operation.answers, *(problem.status for problem in operation.problems)}
        errors: tuple[type[PaymentsError], ...] = (PaymentsError, TooBusy, *operation.problems)
        for error in errors:
            telemetry.problems.labels(error.code)
        telemetry.request_seconds.labels(method.upper(), path)
        for status in statuses:
            telemetry.requests.labels(method.upper(), path, status)


def operations_application(service: Service) -> Litestar:
    """Health and metrics alone, for METRICS_PORT."""
    return _litestar(service)


def guarded(app: Litestar, service: Service) -> ASGIApp:
    """The application behind its guard, as it is served."""
    return Guard(app, service.telemetry, service.settings.access_log_per_s)


def door(app: Litestar, service: Service) -> Door:
    """Decides which requests this application admits."""
    return Door(
        Paths(app, {WEBHOOK: service.hints.names}),
        service.settings.payments_api_keys,
        service.admission,
        service.telemetry,
        alive={"/health/live": ALIVE},
        known={"/health": partial(app.state.health.last, HEALTH_AGE_S)},
    )


def _litestar(service: Service, *handlers: Router) -> Litestar:
    return Litestar(
        route_handlers=[*handlers, health, live, metrics],
        state=State({"service": service, "health": Recent(partial(health_of, service))}),
        exception_handlers={
            PaymentsError: on_payments_error,
            HTTPException: on_http_exception,
            Exception: on_exception,
        },
        logging_config=None,  # payments/observability/logs.py; unhandled errors are logged above
        openapi_config=None,
        debug=False,
    )
