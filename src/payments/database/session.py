"""Sets and verifies the settings of every session.

A statement sets them after connecting: a pooler would reject them as startup parameters, or drop
them silently (PgBouncer's ignore_startup_parameters).

A session must belong to one connection from its first statement to its last. LISTEN, advisory
locks, prepared statements and the settings do not survive a pooler that shares a session between
connections (transaction and statement pooling), or passes it on without a reset. So each connection
leaves a mark in its session: a new connection must find none, and later its own. (The server's
process id does not reveal a session that is reset after each transaction.)
"""

from collections.abc import Sequence
from typing import Any

import psycopg

# As the server shows them. Its timeouts back up ours: they free the locks of a client that was cut
# off or frozen.
SETTINGS = {
    "TimeZone": "UTC",
    # append_payment_events must see what the previous holder of its lock committed.
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    # A plan from when a table was small is kept while it grows, until new statistics: a scan that
    # suited ten rows would then read the whole table. Every query has its index.
    "enable_seqscan": "off",
    "jit": "off",  # compiling takes longer than our queries
    "statement_timeout": "2s",
    "lock_timeout": "1200ms",
    "idle_in_transaction_session_timeout": "5s",
}

MARK = "payments.database.session"

# The mark of the session's previous connection, the new mark, and the new value of each setting.
SET_UP = f"""
SELECT current_setting('{MARK}', true), set_config('{MARK}', gen_random_uuid()::text, false),
       {", ".join(f"set_config('{name}', '{value}', false)" for name, value in SETTINGS.items())}
"""

# The mark, and the value of each setting.
LOOK = f"""
SELECT current_setting('{MARK}', true), {", ".join(f"current_setting('{n}')" for n in SETTINGS)}
"""

POOLED = (
    "sessions are not kept apart: a pooler shares one between connections, or passes it on without "
    "a reset; use session pooling (PgBouncer: pool_mode = session, with "
    "server_reset_query = DISCARD ALL) or a direct connection"
)


class SessionUnfit(psycopg.OperationalError):
    """The session is shared with other connections, or its settings are wrong; the message is one
    line."""


def mark_of_new(row: Sequence[Any]) -> str:
    """The new mark, from the row of SET_UP; raises SessionUnfit."""
    left, mark, *values = row
    if left:  # a session that was reset has ''
        raise SessionUnfit(POOLED)
    _compare(values)
    return str(mark)


def check(row: Sequence[Any], mark: str) -> None:
    """Raises SessionUnfit unless the row of LOOK shows this mark and all settings."""
    found, *values = row
    if found != mark:
        raise SessionUnfit(POOLED)
    _compare(values)


def settings_in_force(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """The value of each setting in a session; raises psycopg.Error."""
    ((_, *values),) = connection.execute(LOOK.encode()).fetchall()
    return dict(zip(SETTINGS, values, strict=True))


def _compare(values: Sequence[str]) -> None:
    unlike = [
        f"{name} is {value!r} instead of {wanted!r}"
        for (name, wanted), value in zip(SETTINGS.items(), values, strict=True)
        if value != wanted
    ]
    if unlike:
        raise SessionUnfit(f"the session does not have the requested settings: {', '.join(unlike)}")
