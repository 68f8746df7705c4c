"""The HTTP interface of the Payment Service.

serving/       from the listening socket to a request
app.py         the Litestar application; its endpoints under /v1: charges.py, refunds.py,
               payments.py, unfulfilled.py, provider_webhooks.py
requests.py    reads header section, path and JSON body of a request
answer.py      the responses of the endpoints under /v1
list_query.py  reads query parameters
operations.py  /health and /metrics
accept.py      chooses their media type
paths.py       the paths of the API
schema/        describes each operation: the OpenAPI document and its page
auth.py        API keys
problems.py    every error as application/problem+json
exception_handlers.py  the responses to exceptions of handlers
"""
