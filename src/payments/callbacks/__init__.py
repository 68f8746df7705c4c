"""Callbacks: telling Order Service what became of its payments, at least once and in order.

The follower in projections/callbacks.py writes what is owed; here it is sent. dispatcher.py is the
loop: it claims due deliveries from outbox.py (SQL: claim, record, release), sends each with
endpoint.py (one bounded exchange; heads.py is for responses of every form), signed by signing.py
(Standard Webhooks), and records what came of it. retry.py says whether and when to try again,
breaker.py whether to send at all; both are pure.

endpoint.py is imported where an address is set: its HTTP client takes a third of the time in which
a command starts.
"""

EXCHANGE_TIMEOUT_S = 5.0  # Order Service answers in milliseconds; 5 s is a hang
