"""Fulfilment: whether the order of a captured payment was confirmed.

If the response to a SUCCESS does not say "confirmed", the dispatcher records a suspect in
`fulfilments`, in the statement that records the delivery. Only ORDER_STATUS_URL states the order's
status; order_service/responses.py reads both responses. See docs/decisions/fulfilment.md.

status.py          asks ORDER_STATUS_URL about one order: one bounded exchange
checking.py        the loop that asks about suspects until their status is known
table.py           the SQL of `fulfilments`
reconciliation.py  asks about all payments of a period, for `payments reconcile orders`
"""
