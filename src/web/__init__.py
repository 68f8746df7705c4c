"""The HTTP face of the Payment Service.

guard.py       what every request passes first: limits, request id, metrics (plain ASGI)
app.py         the Litestar application
api.py         /v1: charges and payments      bodies.py  reading JSON bodies, all errors at once
operations.py  /health and /metrics
auth.py        API keys
problems.py    every error as application/problem+json
protocol.py    limits on request heads and silent connections
server.py      uvicorn inside our own process, and the ordered shutdown
"""
