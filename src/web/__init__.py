"""The HTTP face of the Payment Service.

serving/       from the listening socket to a request
app.py         the Litestar application, with what is under /v1: charges.py, refunds.py,
               payments.py, unfulfilled.py
requests.py    what they read from headers and path     bodies.py  from JSON bodies
list_query.py  and from the query; all errors at once
operations.py  /health and /metrics                 accept.py     in which media type
paths.py       which paths there are
schema/        what each operation promises, as the OpenAPI document, and its page
auth.py        API keys
problems.py    every error as application/problem+json (exception_handlers.py: what handlers
               raise)
"""
