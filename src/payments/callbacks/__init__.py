"""Callbacks: sends the outcomes of payments to Order Service, at least once and in order.

The follower in projections/callbacks.py enqueues callbacks; this package sends them.

dispatcher.py       the loop: claims due deliveries, sends each with order_service/endpoint.py, and
                    records the results
outbox.py           the SQL: claim, record, redrive, prune
retry.py            decides whether and when to retry; pure
breaker.py          decides whether to send at all; pure
endpoint_health.py  passes the result of each attempt to the breaker, and logs outages
ping.py             sends a test request without an outcome
"""

# A process that was frozen between claim and exchange starts no exchange after this.
BEGIN_WITHIN_S = 4.0


def lease_s(timeout_s: float) -> float:
    """How long a claim of an order lasts: an exchange that starts as late as possible takes
    `timeout_s`, and Order Service may work on it for as long again after its sender died."""
    return BEGIN_WITHIN_S + 2 * timeout_s + 1.0
