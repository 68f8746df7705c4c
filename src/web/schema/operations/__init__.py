"""What the API promises, by resource: the bodies, and what OpenAPI says beyond them. The summary of
an operation is the first line of its handler's docstring.

charges.py      POST /v1/charge
refunds.py      POST /v1/refund
payments.py     GET /v1/payments and what is below it
unfulfilled.py  GET /v1/unfulfilled
operators.py    /health and /metrics
"""
