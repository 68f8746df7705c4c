"""An outbox of many orders that no callback was sent for yet."""

from typing import Any

import psycopg

ORDERS = 60_000

DELIVERIES = """
INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence, status,
                                 amount_cents, currency, occurred_at, state)
SELECT md5('e' || n)::uuid, n, md5('o' || n)::uuid, md5('p' || n)::uuid, 2,
       CASE WHEN n %% 20 = 0 THEN 'FAILED' ELSE 'SUCCESS' END, 1500, 'INR', now(), 'due'
  FROM generate_series(%(first)s::integer, %(last)s::integer) n
"""

LANES = """
INSERT INTO callback_lanes (order_id, next_at, failing, away_at)
SELECT md5('o' || n)::uuid, now() + CASE WHEN n %% 3 = 0 THEN interval '1 h' ELSE '0 s' END,
       n %% 3 = 0, CASE WHEN n %% 3 = 0 THEN now() END
  FROM generate_series(%(first)s::integer, %(last)s::integer) n
"""


def fill(connection: psycopg.Connection[Any], first: int, last: int) -> None:
    connection.execute("SET statement_timeout = 0")
    for query in (DELIVERIES, LANES):
        connection.execute(query.encode(), {"first": first, "last": last})
