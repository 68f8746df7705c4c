"""Fulfilment: whether the order of a captured payment became what was paid for.

A response to a SUCCESS is only suspicion: the dispatcher writes what does not say "confirmed" into
`fulfilments`, in the statement that records the delivery. ORDER_STATUS_URL tells the order's status
itself (status.py: one bounded exchange), and checking.py asks there until it is known.

order_service/responses.py says what either response means. table.py is the SQL of `fulfilments`.
reconciliation.py asks about all payments of a time, for `payments reconcile orders`. Why it is so:
docs/decisions/fulfilment.md.
"""
