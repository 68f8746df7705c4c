"""The HTTP face of the Payment Service.

guard.py       what every request passes first: limits, request id, metrics (plain ASGI)
access_log.py  a line for each response
app.py         the Litestar application
api.py         /v1: charges.py, refunds.py, payments.py, callbacks.py, unfulfilled.py
requests.py    what they read from headers and path     bodies.py  from JSON bodies
list_query.py  and from the query of the list; all errors at once     as_of.py  ?as_of=
operations.py  /health and /metrics                 accept.py     in which media type
description.py what handlers say of themselves      openapi.py    the document made of it
webhooks.py    what Order Service is sent, for that document
docs.py        /schema: that document, and Swagger UI
auth.py        API keys
problems.py    every error as application/problem+json
protocol.py    reads requests: those that come in become tasks (connection.py: how it ends;
               heads.py: what a head may be; arrivals.py: since when it waits; memory.py: what all
               that holds)
door.py        whether a request comes in, and as whom (paths.py: what there is; answers.py: to
               those that do not; throttle.py: how late in a flood)
server.py      uvicorn inside our own process, and the ordered shutdown (listening.py: its socket)
"""
