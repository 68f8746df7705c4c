"""The Litestar application on a Service."""

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp

from payments.errors import PaymentsError
from payments.service import Service
from web import openapi
from web.api import v1
from web.docs import docs
from web.guard import Guard
from web.operations import health, live, metrics
from web.problems import on_exception, on_http_exception, on_payments_error


def create_app(service: Service) -> ASGIApp:
    """The whole HTTP application, guard included; the service must be started by the caller."""
    app = _litestar(service, v1)
    app.state.openapi = openapi.document(app)
    app.register(docs)  # afterwards: it is no part of what it describes
    return Guard(app, service.telemetry, service.admission)


def create_operations_app(service: Service) -> ASGIApp:
    """Health and metrics alone, for METRICS_PORT."""
    return Guard(_litestar(service), service.telemetry, service.admission)


def _litestar(service: Service, *handlers: Router) -> Litestar:
    return Litestar(
        route_handlers=[*handlers, health, live, metrics],
        state=State({"service": service}),
        exception_handlers={
            PaymentsError: on_payments_error,
            HTTPException: on_http_exception,
            Exception: on_exception,
        },
        logging_config=None,  # telemetry.set_up_logs does it; unhandled errors are logged above
        openapi_config=None,
        debug=False,
    )
