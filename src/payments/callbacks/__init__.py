"""Callbacks: telling Order Service what became of its payments, at least once and in order.

The follower in projections/callbacks.py writes what is owed; here it is sent. dispatcher.py is the
loop: it claims due deliveries from outbox.py (SQL: claim, record, release), sends each with
order_service/endpoint.py, and records what came of it. retry.py says whether and when to try again,
breaker.py whether to send at all; both are pure. endpoint_health.py notes for it, for people and
for what failed in an outage how each attempt went. ping.py sends one request that tells nothing.
"""

# A process that was frozen between claim and exchange begins no exchange after this.
BEGIN_WITHIN_S = 4.0


def lease_s(timeout_s: float) -> float:
    """For how long an order belongs to whoever claimed it: an exchange that began as late as it may
    takes `timeout_s`, and as long again it may be running after its sender died."""
    return BEGIN_WITHIN_S + 2 * timeout_s + 1.0
