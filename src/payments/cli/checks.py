"""The checks of `payments doctor`, a line for each, and those of the database server.

They cover every alert that the database has data for: ALERTS names the check, a test compares it
with deploy/prometheus/alerts.yml. A line that is not ok names the next step, and the first affected
payments or callbacks.
"""

import asyncio
import time
from typing import Literal, NamedTuple

from payments.database.connections import Database
from payments.events.losses import log_id, open_loss
from payments.queries.server import (
    UNSAFE_MEANS,
    Horizon,
    Role,
    ServerState,
    horizon,
    role_of,
    server_state,
    unread_notifications,
    unsafe_settings,
    waiting_appends,
)

# docs/security.md
ROLES: dict[Role, str] = {
    "owner": "this role owns the log, and may alter it; docs/security.md has a stricter set-up",
    "inserts": "this role may insert into the log; docs/security.md has a stricter set-up",
    "appends": "only the append function may write to the log",
    "reads": "this role may only read the log",
}
SKEW_MAX_S = 2.0  # deadlines and ages are by the database's clock, occurred_at by ours
# The limits of the alerts.
LAG_MAX_S = 30.0
PENDING_MAX_S = 120.0
RETURN_MAX_S = 3600.0
CALLBACK_AGE_MAX_S = 300.0
UNFULFILLED_MAX_S = 1800.0
SUSPECT_MAX_S = 3600.0
HORIZON_MAX_S = 600.0
QUEUE_MAX = 0.1
# If the age is not visible: the transactions of that time at full load.
HORIZON_MAX_TRANSACTIONS = 500_000
# An append that waits for a lock times out after about a second, and is retried. The lock is held
# if an append waits for WAITS_S, and one waited for the same session WAITED_S before. If any append
# waits, the check takes longer.
WAITS_S, WAITED_S = 0.5, 1.5
LOOK_EVERY_S, LOOK_FOR_S, LOOK_ON_FOR_S = 0.15, 0.4, 4.0


class Told(NamedTuple):
    """The line `check` covers the alert; it fails beyond `limit`, or earlier."""

    check: str
    limit: float = 0.0


# The check for each alert, or the reason why doctor has none.
ALERTS: dict[str, Told | str] = {
    "PaymentsWatchdog": "it always fires",
    "PaymentsGone": "only a request to a process shows whether it serves requests",
    "PaymentsNobodyWorks": Told("work"),
    "PaymentsDown": "only a request to a process shows whether it responds",
    "PaymentsDatabaseAway": Told("database"),
    "PaymentsLogRewound": Told("log"),
    "PaymentsAppendsWait": Told("appends", 10.0),
    "PaymentsProviderDown": "each process has its own breaker for each provider",
    "PaymentsProviderTrouble": "each process counts its own provider calls",
    "PaymentsProviderContradicts": Told("provider"),
    "PaymentsWebhooksRejected": "each process counts its own webhooks",
    "PaymentsFollowerLag": Told("follower", LAG_MAX_S),
    "PaymentsParkedStreams": Told("follower"),
    "PaymentsPendingTooLong": Told("payments", PENDING_MAX_S),
    "PaymentsRefundOpenTooLong": Told("refunds", RETURN_MAX_S),
    "PaymentsGivingBackStopped": Told("brake"),
    "PaymentsBreakerOpen": "each process has its own circuit breaker",
    "PaymentsCallbacksOld": Told("callbacks", CALLBACK_AGE_MAX_S),
    "PaymentsCallbacksDead": Told("callbacks"),
    "PaymentsUnfulfilled": Told("orders", UNFULFILLED_MAX_S),
    "PaymentsPaidTwice": Told("orders"),
    "PaymentsFulfilmentUnknown": Told("orders", SUSPECT_MAX_S),
    "PaymentsServerErrors": "each process counts its own responses",
    "PaymentsFailoverWouldLose": Told("standbys"),
    "PaymentsClockSkew": Told("clock", 60.0),
    "PaymentsVacuumHeld": Told("vacuum", HORIZON_MAX_S),
    "PaymentsNotificationsUnread": Told("listeners", QUEUE_MAX),
}


class Check(NamedTuple):
    """`off`: switched off, which is not a failure."""

    state: Literal["ok", "off", "FAIL"]
    name: str
    text: str


def _page(alert: str) -> str:
    return f"docs/operations.md#payments{alert}"


def failing(name: str, bad: bool, text: str) -> Check:
    return Check(state="FAIL" if bad else "ok", name=name, text=text)


async def server_checks(database: Database) -> list[Check]:
    """Checks the database server, and whether the log has lost events."""
    server = await server_state(database)
    checks = [_clock(server), _standbys(server), _durability(await unsafe_settings(database))]
    if server.read_only:
        text = (
            "it refuses writes: it is a standby, or read-only; DATABASE_HOST must name the "
            "primary: `payments settings`"
        )
        checks.append(Check(state="FAIL", name="database", text=text))
    checks.append(await _log(database, server))
    checks.append(Check(state="ok", name="role", text=ROLES[await role_of(database)]))
    checks.append(await _appends(database))
    checks.append(_vacuum(await horizon(database)))
    unread = await unread_notifications(database)
    text = f"the queue of notifications is {unread:.0%} full"
    if unread > QUEUE_MAX:
        text += f": a session does not read its notifications: {_page('notificationsunread')}"
    checks.append(failing("listeners", unread > QUEUE_MAX, text))
    return checks


def _clock(server: ServerState) -> Check:
    skew_s = abs(server.skew_s)
    where = f"{skew_s:.1f} s apart" if skew_s > 0.1 else "together"
    if server.skew_s < 0:
        where += ", the database's is behind"
    elif skew_s > 0.1:
        where += ", the database's is ahead"
    bad = skew_s > SKEW_MAX_S
    if bad:
        where += ": `chronyc tracking` or `timedatectl` on each machine shows which clock is wrong"
    return failing("clock", bad, f"this machine's and the database's: {where}")


def _standbys(server: ServerState) -> Check:
    """Checks the standbys of the database."""
    if server.synchronous + server.asynchronous == 0:
        return Check(state="off", name="standbys", text="none: a failover needs one, or a backup")
    text = f"{server.synchronous} synchronous, {server.asynchronous} asynchronous"
    if server.may_lose:
        text += ": a failover may lose acknowledged payments; `SHOW synchronous_standby_names` must"
        text += f" name one: {_page('failoverwouldlose')}"
    return failing("standbys", server.may_lose, text)


def _durability(unsafe: list[str]) -> Check:
    """Checks whether committed data survives a crash."""
    if not unsafe:
        return Check(state="ok", name="durability", text="fsync and full_page_writes are on")
    remedy = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in unsafe)
    return Check(
        state="FAIL",
        name="durability",
        text=f"off: {' and '.join(unsafe)}; {UNSAFE_MEANS}: `{remedy}`",
    )


async def _log(database: Database, server: ServerState) -> Check:
    loss, id = await open_loss(database), await log_id(database)
    text = "its id is missing: `payments audit verify`" if id is None else str(id)
    if server.log_ahead_s:
        text += f": its last event is {server.log_ahead_s:.0f} s ahead of the database's clock"
        text += f": {_page('clockskew')}"
    if loss is not None:
        text += (
            f": acknowledged events up to position {loss.lost_position} are missing (found by "
            f"{loss.found_by}): `payments log accept-loss`"
        )
    bad = id is None or loss is not None or server.log_ahead_s > SKEW_MAX_S
    return failing("log", bad, text)


async def _appends(database: Database) -> Check:
    """Checks the appends of all processes."""
    began, look_for_s, first_seen = time.monotonic(), LOOK_FOR_S, dict[str, float]()
    while (now := time.monotonic()) < began + look_for_s:
        for who, waits_s in (await waiting_appends(database)).items():
            look_for_s = LOOK_ON_FOR_S
            if waits_s > WAITS_S and now - first_seen.setdefault(who, now) > WAITED_S:
                text = f"they wait for {who}: {_page('appendswait')}"
                return Check(state="FAIL", name="appends", text=text)
        await asyncio.sleep(LOOK_EVERY_S)
    return Check(state="ok", name="appends", text="none waits long")


def _vacuum(found: Horizon) -> Check:
    bad = found.held_s > HORIZON_MAX_S or found.transactions > HORIZON_MAX_TRANSACTIONS
    if not bad:
        return Check(state="ok", name="vacuum", text="no session or slot holds it up for long")
    since = f"for {found.held_s:.0f} s, " if found.held_s else ""
    text = f"held up {since}for {found.transactions} transactions by {found.held_by}"
    text += f": {_page('vacuumheld')}"
    return Check(state="FAIL", name="vacuum", text=text)
