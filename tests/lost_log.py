"""A log that went back, as after a failover to a standby that lagged, or a restore."""

from typing import Any

import psycopg

_TABLES = {"payment_events": "notification_id", "log_seals": "position"}

_READ_MODELS = {
    "payments": "id",
    "refunds": "payment_id",
    "payment_clients": "payment_id",
    "unsettled_payments": "payment_id",
}


def lose_after(connection: psycopg.Connection[Any], position: int) -> None:
    """The log ends at `position` from now on, its seals and its followers too."""
    for table, column in _TABLES.items():
        connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL".encode())
        connection.execute(f"DELETE FROM {table} WHERE {column} > %s".encode(), [position])
        connection.execute(
            f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_append_only".encode()
        )
    connection.execute(
        "DELETE FROM provider_references r WHERE NOT EXISTS (SELECT FROM payment_events e"
        " WHERE e.originator_id = r.payment_id AND stored_reference(e.state) = r.reference)"
    )
    connection.execute("UPDATE followers SET position = least(position, %s)", [position])
    for table, column in _READ_MODELS.items():
        connection.execute(
            f"DELETE FROM {table} WHERE {column} NOT IN"
            " (SELECT originator_id FROM payment_events)".encode()
        )


def accept_loss(connection: psycopg.Connection[Any]) -> None:
    """As `payments log accept-loss`, for whatever was found."""
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, head_position)"
        " SELECT 'accepted', 'a person', 'compared', min(kept_position), max(lost_position), 0"
        "   FROM log_losses WHERE kind = 'found'"
    )
