"""The HTTP interface of the Payment Service.

serving/       from the listening socket to a request
app.py         the Litestar application; its endpoints under /v1: charges.py, refunds.py,
               payments.py, unfulfilled.py, provider_webhooks.py
requests.py    reads headers and path
answer.py      the response of an endpoint under /v1
bodies.py      reads JSON bodies
charge_fields.py  rules for a charge that no schema can state
list_query.py  reads query parameters
operations.py  /health and /metrics
accept.py      chooses their media type
paths.py       the paths of the API
schema/        describes each operation: the OpenAPI document and its page
auth.py        API keys
problems.py    every error as application/problem+json
exception_handlers.py  the responses to exceptions of handlers
"""
