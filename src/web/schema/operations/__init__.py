"""The operations of the API, by resource: their bodies and their descriptions. The summary of an
operation is the first line of its handler's docstring.

charges.py      POST /v1/charge
refunds.py      POST /v1/refund
payments.py     GET /v1/payments and what is below it
unfulfilled.py  GET /v1/unfulfilled
providers.py    POST /v1/providers/{name}/webhook
operators.py    /health and /metrics
"""
