"""The endpoints under /v1."""

from litestar import Router

from web.callbacks import callbacks
from web.charges import charge
from web.payments import events, payment, payments
from web.refunds import refund
from web.unfulfilled import unfulfilled

v1 = Router(
    "/v1",
    route_handlers=[charge, refund, payments, payment, events, callbacks, unfulfilled],
)
