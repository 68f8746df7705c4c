"""What `payments doctor` looks at in the database: a line for each thing.

Of every alert what the database can tell is among them: ALERTS says where, and a test compares it
with deploy/prometheus/alerts.yml.
"""

import asyncio
import time
from typing import Literal, NamedTuple

from payments.database import Database
from payments.events.losses import log_id, open_loss
from payments.queries.callbacks import backlog
from payments.queries.followers import (
    UnsettledPayments,
    contradicted_payments,
    follower_states,
    open_gateways,
    unsettled_payments,
)
from payments.queries.server import (
    UNSAFE_MEANS,
    Horizon,
    Role,
    Server,
    horizon,
    role_of,
    server_state,
    unread_notifications,
    unsafe_settings,
    waiting_appends,
)
from payments.queries.verification import newest_head

# docs/security.md
ROLES: dict[Role, str] = {
    "owner": "this role owns the log, and may alter it; docs/security.md has a stricter set-up",
    "inserts": "this role may insert into the log; docs/security.md has a stricter set-up",
    "appends": "only the append function may write to the log",
    "reads": "this role may only read the log",
}
SKEW_MAX_S = 2.0  # deadlines and ages are told by the database's clock, occurred_at by ours
# As the alerts.
LAG_MAX_S = 30.0
PENDING_MAX_S = 120.0
RETURN_MAX_S = 3600.0
CALLBACK_AGE_MAX_S = 300.0
HORIZON_MAX_S = 600.0
QUEUE_MAX = 0.1
# Where it cannot be seen for how long: as many as there are in that time at full load.
HORIZON_MAX_TRANSACTIONS = 500_000
# An append that waits for a lock for more than a second gives up, and tries again a moment later.
# One that waits for so long, for the same session as another one so long before, shows that it is
# held. If any is seen to wait, they are looked at for longer.
WAITS_S, WAITED_S = 0.5, 1.5
LOOK_EVERY_S, LOOK_FOR_S, LOOK_ON_FOR_S = 0.15, 0.4, 4.0


class Told(NamedTuple):
    """By the line `check`, which fails beyond `limit`, or before that."""

    check: str
    limit: float = 0.0


# Where doctor tells what an alert does, or why it cannot.
ALERTS: dict[str, Told | str] = {
    "PaymentsDown": "whether a process answers is asked at its port",
    "PaymentsPendingTooLong": Told("payments", PENDING_MAX_S),
    "PaymentsRefundOpenTooLong": Told("refunds", RETURN_MAX_S),
    "PaymentsProviderContradicts": Told("provider"),
    "PaymentsProviderTrouble": "each process counts its own calls of the provider",
    "PaymentsCallbacksOld": Told("callbacks", CALLBACK_AGE_MAX_S),
    "PaymentsCallbacksDead": Told("callbacks"),
    "PaymentsBreakerOpen": "each process has a breaker of its own",
    "PaymentsFollowerLag": Told("follower", LAG_MAX_S),
    "PaymentsParkedStreams": Told("follower"),
    "PaymentsServerErrors": "each process counts its own answers",
    "PaymentsAppendsWait": Told("appends", 10.0),
    "PaymentsLogRewound": Told("log"),
    "PaymentsFailoverWouldLose": Told("standbys"),
    "PaymentsClockSkew": Told("clock", 60.0),
    "PaymentsVacuumHeld": Told("vacuum", HORIZON_MAX_S),
    "PaymentsNotificationsUnread": Told("listeners", QUEUE_MAX),
}


class Check(NamedTuple):
    """`off`: it is switched off, which is no fault."""

    state: Literal["ok", "off", "FAIL"]
    name: str
    text: str


def failing(name: str, bad: bool, text: str) -> Check:
    return Check("FAIL" if bad else "ok", name, text)


async def database_checks(database: Database, gateway: str) -> list[Check]:
    """All of them. `gateway` is the name of the provider that the settings name."""
    return [
        *await _server(database),
        *await _followers(database),
        *await _open_payments(database, gateway),
        await _callbacks(database),
    ]


async def _server(database: Database) -> list[Check]:
    """What the server is to the service, and whether the log went back."""
    server = await server_state(database)
    checks = [_clock(server), _standbys(server), _durability(await unsafe_settings(database))]
    if server.read_only:
        text = "it refuses to write: it is a standby, or read-only"
        checks.append(Check("FAIL", "database", text))
    checks.append(await _log(database, server))
    checks.append(Check("ok", "role", ROLES[await role_of(database)]))
    checks.append(await _appends(database))
    checks.append(_vacuum(await horizon(database)))
    unread = await unread_notifications(database)
    text = f"the queue of notifications is {unread:.0%} full"
    if unread > QUEUE_MAX:
        text += ": some session does not read what it listens to"
    checks.append(failing("listeners", unread > QUEUE_MAX, text))
    return checks


def _clock(server: Server) -> Check:
    skew_s = abs(server.skew_s)
    where = f"{skew_s:.1f} s apart" if skew_s > 0.1 else "together"
    if server.skew_s < 0:
        where += ", the database's is behind"
    elif skew_s > 0.1:
        where += ", the database's is ahead"
    return failing("clock", skew_s > SKEW_MAX_S, f"this machine's and the database's: {where}")


def _standbys(server: Server) -> Check:
    """Of the database."""
    if server.synchronous + server.asynchronous == 0:
        return Check("off", "standbys", "none: a failover needs one, or a backup")
    text = f"{server.synchronous} synchronous, {server.asynchronous} asynchronous"
    if server.may_lose:
        text += ": a failover may lose what was answered; set synchronous_standby_names"
    return failing("standbys", server.may_lose, text)


def _durability(unsafe: list[str]) -> Check:
    """Of what the server has committed."""
    if not unsafe:
        return Check("ok", "durability", "fsync and full_page_writes are on")
    return Check("FAIL", "durability", f"off: {' and '.join(unsafe)}; {UNSAFE_MEANS}")


async def _log(database: Database, server: Server) -> Check:
    loss, id = await open_loss(database), await log_id(database)
    text = "its id is missing" if id is None else str(id)
    if server.log_ahead_s:
        text += f": its last event is {server.log_ahead_s:.0f} s ahead of the database's clock"
    if loss is not None:
        text += (
            f": it went back, and lacks up to position {loss.lost_position} what it had "
            f"acknowledged (found by {loss.found_by}): `payments log accept-loss`"
        )
    bad = id is None or loss is not None or server.log_ahead_s > SKEW_MAX_S
    return failing("log", bad, text)


async def _appends(database: Database) -> Check:
    """Those of all processes."""
    began, look_for_s, first_seen = time.monotonic(), LOOK_FOR_S, dict[str, float]()
    while (now := time.monotonic()) < began + look_for_s:
        for who, waits_s in (await waiting_appends(database)).items():
            look_for_s = LOOK_ON_FOR_S
            if waits_s > WAITS_S and now - first_seen.setdefault(who, now) > WAITED_S:
                return Check("FAIL", "appends", f"they wait for {who}")
        await asyncio.sleep(LOOK_EVERY_S)
    return Check("ok", "appends", "none waits for long")


def _vacuum(found: Horizon) -> Check:
    bad = found.held_s > HORIZON_MAX_S or found.transactions > HORIZON_MAX_TRANSACTIONS
    if not bad:
        return Check("ok", "vacuum", "nobody keeps it from removing dead rows for long")
    since = f"for {found.held_s:.0f} s, " if found.held_s else ""
    text = f"held up {since}for {found.transactions} transactions by {found.held_by}"
    return Check("FAIL", "vacuum", text)


async def _followers(database: Database) -> list[Check]:
    """And the seals, which one of them writes."""
    checks = []
    for follower in await follower_states(database):
        text = f"{follower.name}: {follower.lag_events} events behind"
        if follower.lag_events:
            text += f", {follower.lag_s:.0f} s"
        if follower.parked_streams:
            text += f", {follower.parked_streams} payments parked: `payments parked list`"
        bad = follower.lag_s > LAG_MAX_S or follower.parked_streams > 0
        checks.append(failing("follower", bad, text))
    head = await newest_head(database)
    sealed = "nothing is sealed yet" if head is None else f"sealed up to position {head.position}"
    checks.append(Check("ok", "seals", f"{sealed}; `payments audit verify` checks them"))
    return checks


async def _open_payments(database: Database, gateway: str) -> list[Check]:
    """What is left open at the provider, and whether a person has to compare."""
    unsettled = {row.kind: row for row in await unsettled_payments(database)}
    returns = [unsettled.get("refund"), unsettled.get("late_capture")]
    checks = [
        _open("payments", "PENDING", [unsettled.get("charge")], PENDING_MAX_S),
        _open("refunds", "on its way back", returns, RETURN_MAX_S),
    ]
    others = await open_gateways(database)
    others.pop(gateway, None)
    told = await contradicted_payments(database)
    text = "nothing open contradicts it, or belongs to another one"
    if told or others:
        begun = [f"{count} begun with {name}" for name, count in sorted(others.items())]
        found = [f"{told} that it contradicts, or that belong to another one"] if told else []
        text = f"open payments: {', '.join([*found, *begun])}: docs/stuck.md"
    checks.append(failing("provider", bool(told or others), text))
    return checks


def _open(name: str, what: str, found: list[UnsettledPayments | None], limit_s: float) -> Check:
    rows = [row for row in found if row is not None]
    if not rows:
        return Check("ok", name, f"none is {what}")
    oldest_s = max(row.oldest_age_s for row in rows)
    count = sum(row.payments for row in rows)
    return failing(name, oldest_s > limit_s, f"{count} {what}, the oldest for {oldest_s:.0f} s")


async def _callbacks(database: Database) -> Check:
    owed = await backlog(database)
    text = f"{owed.due} due, {owed.dead} dead"
    if owed.due:
        text += f", the oldest for {owed.oldest_age_s:.0f} s"
    bad = owed.dead > 0 or owed.oldest_age_s > CALLBACK_AGE_MAX_S
    return failing("callbacks", bad, text)
