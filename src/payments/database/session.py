"""What every session is set to, and whether that holds.

It is set by a statement once the connection is there: as startup parameters a pooler would refuse
the settings, or drop them without a word (PgBouncer's ignore_startup_parameters).

A session must be one connection's own, from its first statement to its last. LISTEN, advisory
locks, prepared statements and the settings do not survive a pooler that gives the same session to
several connections in turn (transaction and statement pooling), or to the next one as it was left.
So each connection leaves a mark in its session: a new one must find none, and later its own. (The
server's process id would not tell a session that is reset after each transaction.)
"""

from collections.abc import Sequence
from typing import Any

import psycopg

# As the server shows them. Its timeouts stand behind ours: they free what a client that was cut off
# or frozen still holds.
SETTINGS = {
    "TimeZone": "UTC",
    # append_payment_events must see what the previous holder of its lock committed.
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    # A plan that was made while a table was small is kept while it grows, until its statistics are
    # new: a scan that was right for ten rows would then read them all. Every query has its index.
    "enable_seqscan": "off",
    "jit": "off",  # compiling takes longer than any of our queries
    "statement_timeout": "2s",
    "lock_timeout": "1200ms",
    "idle_in_transaction_session_timeout": "5s",
}

MARK = "payments.database.session"

# The mark of whoever had the session before, the new one, and what each setting is from now on.
SET_UP = f"""
SELECT current_setting('{MARK}', true), set_config('{MARK}', gen_random_uuid()::text, false),
       {", ".join(f"set_config('{name}', '{value}', false)" for name, value in SETTINGS.items())}
"""

# The mark, and what each setting is.
LOOK = f"""
SELECT current_setting('{MARK}', true), {", ".join(f"current_setting('{n}')" for n in SETTINGS)}
"""

POOLED = (
    "sessions are not kept apart: a pooler gives one to several connections in turn, or to the "
    "next one as it was left; use session pooling (PgBouncer: pool_mode = session, with "
    "server_reset_query = DISCARD ALL) or a direct connection"
)


class SessionUnfit(psycopg.OperationalError):
    """The session is not the connection's own, or not set as asked; one line that says so."""


def mark_of_new(row: Sequence[Any]) -> str:
    """The mark that SET_UP left, by its answer; SessionUnfit."""
    left, mark, *values = row
    if left:  # a session that was reset has ''
        raise SessionUnfit(POOLED)
    _compare(values)
    return str(mark)


def check(row: Sequence[Any], mark: str) -> None:
    """SessionUnfit unless by the answer of LOOK the session has this mark, and all settings."""
    found, *values = row
    if found != mark:
        raise SessionUnfit(POOLED)
    _compare(values)


def settings_in_force(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """What each setting is in a session; psycopg.Error."""
    ((_, *values),) = connection.execute(LOOK.encode()).fetchall()
    return dict(zip(SETTINGS, values, strict=True))


def _compare(values: Sequence[str]) -> None:
    unlike = [
        f"{name} is {value!r} instead of {wanted!r}"
        for (name, wanted), value in zip(SETTINGS.items(), values, strict=True)
        if value != wanted
    ]
    if unlike:
        raise SessionUnfit(f"the session is not set as it was asked to be: {', '.join(unlike)}")
