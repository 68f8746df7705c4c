"""The errors of commands and queries, as types. Errors of HTTP requests are in web/problems.py.

PaymentsError
├── InvalidRequest               400  invalid_request
├── InvalidIdempotencyKey        400  invalid_idempotency_key
├── BadWebhookSignature          400  bad_signature
├── Unauthorized                 401  unauthorized
├── PaymentNotFound              404  payment_not_found
├── PaymentNotRefundable         409  payment_not_refundable
├── PaymentAlreadyRefunded       409  payment_already_refunded
├── RefundExceedsCapture         409  refund_exceeds_capture
├── RefundDeclined               409  refund_declined
├── OrderAlreadyPaid             409  order_already_paid
├── IdempotencyKeyReused         422  idempotency_key_reused
├── PaymentMethodReused          422  payment_method_reused
├── PaymentUnreadable            503  payment_unreadable
└── Unavailable                  503
    ├── TooBusy                       too_busy
    ├── DatabaseUnavailable           database_unavailable
    ├── GatewayUnavailable            gateway_unavailable
    ├── ClientGone                    client_gone
    └── LogRewound                    log_rewound

A class defines the HTTP status, the stable code and the title of its response. The message of an
instance is the response's `detail`, so it names the fix and contains no secret.

StartError is for people who start the service or run a command: one line, no traceback, exit code
1, or 2 where 1 is a finding.
"""

from typing import ClassVar, NamedTuple


class FieldError(NamedTuple):
    """An error of one field of a request, and its fix."""

    field: str
    message: str


class PaymentsError(Exception):
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The service failed unexpectedly"
    errors: tuple[FieldError, ...] = ()
    retry_after_s: int | None = None


class InvalidRequest(PaymentsError):
    status = 400
    code = "invalid_request"
    title = "The request is not valid"

    def __init__(self, detail: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail)
        self.errors = errors


class InvalidIdempotencyKey(InvalidRequest):
    code = "invalid_idempotency_key"
    title = "The Idempotency-Key header is missing or not valid"


class BadWebhookSignature(PaymentsError):
    """Not 401, which has to name a scheme of authentication (RFC 9110 section 15.5.2)."""

    status = 400
    code = "bad_signature"
    title = "The webhook is not signed by the provider"


class Unauthorized(PaymentsError):
    status = 401
    code = "unauthorized"
    title = "A valid API key is needed"


class PaymentNotFound(PaymentsError):
    status = 404
    code = "payment_not_found"
    title = "The payment does not exist"


class PaymentNotRefundable(PaymentsError):
    status = 409
    code = "payment_not_refundable"
    title = "This payment cannot be refunded"


class PaymentAlreadyRefunded(PaymentsError):
    status = 409
    code = "payment_already_refunded"
    title = "The payment is already refunded in full"


class RefundExceedsCapture(PaymentsError):
    status = 409
    code = "refund_exceeds_capture"
    title = "The refund exceeds the refundable amount"


class RefundDeclined(PaymentsError):
    status = 409
    code = "refund_declined"
    title = "The provider refused the refund"


class OrderAlreadyPaid(PaymentsError):
    status = 409
    code = "order_already_paid"
    title = "The order is already paid by another payment"


class IdempotencyKeyReused(PaymentsError):
    status = 422
    code = "idempotency_key_reused"
    title = "The Idempotency-Key was used for a different request"

    def __init__(self, differing: tuple[str, ...]) -> None:
        if "client" in differing:
            detail = "Another client has used this key. All clients share one key namespace: "
            detail += "prefix your keys with something that no other client can guess."
        else:
            detail = f"The key was first used with a different {', '.join(differing)}. To retry "
            detail += "the first request, send it unchanged; for a new request, use a new key."
        super().__init__(detail)
        self.errors = tuple(
            FieldError(name, "differs from the first request with this key") for name in differing
        )


class PaymentMethodReused(PaymentsError):
    status = 422
    code = "payment_method_reused"
    title = "Another charge was begun with this payment method"


class PaymentUnreadable(PaymentsError):
    status = 503
    code = "payment_unreadable"
    title = "The payment's events cannot be read"


class Unavailable(PaymentsError):
    """Nothing was captured: the client may retry with the same key."""

    status = 503
    title = "The service cannot process this request now"
    retry_after_s = 1


class TooBusy(Unavailable):
    code = "too_busy"


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class GatewayUnavailable(Unavailable):
    code = "gateway_unavailable"


class ClientGone(Unavailable):
    """Nothing was begun for a request whose client had disconnected, or had waited too long."""

    code = "client_gone"
    title = "The request was read too late to start the charge"


class LogRewound(Unavailable):
    """Nothing is given back until an operator has accepted the loss of the log."""

    code = "log_rewound"
    title = "The event log lost events; refunds are stopped until an operator accepts the loss"
    retry_after_s = 60


class StartError(Exception):
    """The service cannot start or a command cannot run; the message is one line for people."""


def told(error: Exception) -> str:
    """An error from foreign code in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
