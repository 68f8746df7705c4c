"""What the service does: decides, asks the provider, and appends what came of it.

charge.py       charge a payment exactly once per idempotency key
refund.py       give back a captured payment, or a part of it
asking.py       what a provider is asked, which one, and which new charges are refused
settle.py       ask the provider what became of one payment that was left open
settling_loop.py  which open payments are settled, when, and how many at once: the loop
hints.py        take a webhook of a provider: its payment is due now
runs.py         work that a request begins and the service finishes, and who waits for it
outcomes.py     appending what a provider did
paid_orders.py  whether an order is paid already, for SECOND_CHARGE=refuse
unfulfilled.py  gives back a payment whose order failed, for UNFULFILLED=refund
importing.py    brings the payments of the Node service into the log
legacy_rows.py  reads the rows of its table, and says what is wrong with them
giving_back.py  sending money back to the provider, for refunds and late captures
telling.py      when an open payment is logged for a person
"""
