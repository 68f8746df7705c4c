"""The HTTP face of the Payment Service.

guard.py       what every request passes first: limits, request id, metrics (plain ASGI)
app.py         the Litestar application
api.py         /v1: charges.py, refunds.py, payments.py
requests.py    what they read from headers and path     bodies.py  from JSON bodies
list_query.py  and from the query of the list; all errors at once
operations.py  /health and /metrics
description.py what handlers say of themselves      openapi.py    the document made of it
docs.py        /schema: that document, and Swagger UI
auth.py        API keys
problems.py    every error as application/problem+json
protocol.py    limits on request heads and silent connections
server.py      uvicorn inside our own process, and the ordered shutdown
"""
