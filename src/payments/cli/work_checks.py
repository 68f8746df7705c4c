"""The checks of `payments doctor` for background work and unsettled payments."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from payments import brake
from payments.cli.checks import (
    CALLBACK_AGE_MAX_S,
    LAG_MAX_S,
    PENDING_MAX_S,
    RETURN_MAX_S,
    Check,
    failing,
)
from payments.database.connections import Database
from payments.gateways.accounts import known_accounts
from payments.queries.callbacks import (
    Backlog,
    Delivery,
    backlog,
    dead_deliveries,
    due_deliveries,
)
from payments.queries.followers import (
    FollowerState,
    UnsettledPayments,
    contradicted_payments,
    follower_states,
    followers_at_work,
    next_payments,
    oldest_unsettled,
    open_gateways,
    parked_streams,
    unsettled_payments,
)
from payments.queries.verification import newest_head

NAMED_MAX = 3  # ids in a line
WORKERS = "`payments serve` or `payments work`"


class LeftOpen(NamedTuple):
    """Payments that are open for these kinds of reason, and the time limit for that."""

    name: str
    what: str
    kinds: Sequence[str]
    limit_s: float


PAYMENTS = LeftOpen(name="payments", what="PENDING", kinds=["charge"], limit_s=PENDING_MAX_S)
REFUNDS = LeftOpen(
    name="refunds", what="being refunded", kinds=["refund", "late_capture"], limit_s=RETURN_MAX_S
)


async def work_checks(
    database: Database, gateways: Sequence[str], *, calls_back: bool
) -> list[Check]:
    """`gateways` are the names of the configured providers; `calls_back`: ORDER_CALLBACK_URL is
    set. Without it, due callbacks and the lag of their follower are not failures.
    """
    followers = await follower_states(database)
    if not calls_back:
        followers = [follower for follower in followers if follower.name != "callbacks"]
    unsettled = await unsettled_payments(database)
    owed = await backlog(database)
    head = await newest_head(database)
    sealed = "nothing is sealed yet" if head is None else f"sealed up to position {head.position}"
    due = owed.due if calls_back else 0
    return [
        _work(await followers_at_work(database), followers, unsettled, due),
        *[await _follower(database, follower) for follower in followers],
        Check(state="ok", name="seals", text=f"{sealed}; `payments audit verify` checks them"),
        await _open(database, PAYMENTS, unsettled),
        await _open(database, REFUNDS, unsettled),
        await _provider(database, gateways),
        await _accounts(database, gateways),
        await _callbacks(database, owed, calls_back),
    ]


def _named(ids: Sequence[object], count: int) -> str:
    """The first ids, and how many more there are."""
    more = count - len(ids)
    return ", ".join(map(str, ids)) + (f" and {more} more" if more > 0 else "")


def _work(
    at_work: Sequence[str],
    followers: Sequence[FollowerState],
    unsettled: Sequence[UnsettledPayments],
    due: int,
) -> Check:
    """Checks whether a process does the background work, if there is any to do."""
    if at_work:
        return Check(state="ok", name="work", text=f"following: {', '.join(at_work)}")
    waits = {
        "events": max((follower.lag_events for follower in followers), default=0),
        "unsettled payments": sum(row.payments for row in unsettled),
        "callbacks": due,
    }
    waiting = ", ".join(f"{count} {what}" for what, count in waits.items() if count)
    text = "no process follows the log, settles and sends callbacks"
    if not waiting:
        return Check(state="off", name="work", text=f"{text}: {WORKERS} does")
    return Check(
        state="FAIL", name="work", text=f"{text}, but {waiting} are waiting: start {WORKERS}"
    )


async def _follower(database: Database, follower: FollowerState) -> Check:
    late = follower.lag_s > LAG_MAX_S
    text = f"{follower.name}: {follower.lag_events} events behind"
    if follower.lag_events:
        text += f", {follower.lag_s:.0f} s"
    if late:
        position, ids = await next_payments(database, follower.position, NAMED_MAX)
        text += f", from position {position} on, of payment {_named(ids, 0)}"
        text += f": `payments replay --from {position} --limit {NAMED_MAX}`; {WORKERS} must run"
    if follower.parked_streams:
        streams = await parked_streams(database, follower.name, NAMED_MAX)
        ids = [stream.payment_id for stream in streams]
        text += f", {follower.parked_streams} payments parked: `payments parked list`: "
        text += _named(ids, follower.parked_streams)
    return failing("follower", late or follower.parked_streams > 0, text)


async def _open(
    database: Database, looked_for: LeftOpen, unsettled: Sequence[UnsettledPayments]
) -> Check:
    """Checks how long payments have been unsettled."""
    name, what, kinds, limit_s = looked_for
    rows = [row for row in unsettled if row.kind in kinds]
    if not rows:
        return Check(state="ok", name=name, text=f"none is {what}")
    oldest_s = max(row.oldest_age_s for row in rows)
    count = sum(row.payments for row in rows)
    text = f"{count} {what}, the oldest for {oldest_s:.0f} s"
    if oldest_s > limit_s:
        text += _to_explain(await oldest_unsettled(database, kinds, NAMED_MAX), count)
    return failing(name, oldest_s > limit_s, text)


def _to_explain(ids: Sequence[UUID], count: int) -> str:
    return f": {_named(ids, count)}: `payments explain {ids[0]}`" if ids else ""


async def _provider(database: Database, gateways: Sequence[str]) -> Check:
    """Checks for payments that need manual comparison with the provider."""
    found_open = await open_gateways(database, NAMED_MAX)
    others = {name: found for name, found in found_open.items() if name not in gateways}
    told, told_ids = await contradicted_payments(database, gateways, NAMED_MAX)
    if not told and not others:
        return Check(
            state="ok",
            name="provider",
            text="no unsettled payment contradicts it, or belongs to another provider",
        )
    found = []
    if told:
        what = f"{told} that it contradicts, or that belong to another provider"
        found.append(what + _to_explain(told_ids, told))
    for name, (count, ids) in sorted(others.items()):
        what = f"{count} begun with {name}, which GATEWAYS does not name"
        found.append(what + _to_explain(ids, count))
    return Check(
        state="FAIL", name="provider", text=f"unsettled payments: {', '.join(found)}: docs/stuck.md"
    )


async def _accounts(database: Database, gateways: Sequence[str]) -> Check:
    """Which account of each provider the payments are in. Whether it is the one that is configured,
    each process asks the provider when it starts."""
    known = {each.gateway: each for each in await known_accounts(database)}
    found = []
    for name in dict.fromkeys((*gateways, *known)):
        noted = known.get(name)
        found.append(
            f"{name}: {noted.account} since {noted.noted_at:%Y-%m-%d}" if noted else f"{name}: none"
        )
    return Check(state="ok", name="accounts", text=", ".join(found))


async def _callbacks(database: Database, owed: Backlog, calls_back: bool) -> Check:
    text = f"{owed.due} due, {owed.dead} dead"
    if not calls_back and not owed.dead:
        return Check(state="off", name="callbacks", text=f"{text}; ORDER_CALLBACK_URL is not set")
    if owed.due:
        text += f", the oldest for {owed.oldest_age_s:.0f} s"
    late = owed.oldest_age_s > CALLBACK_AGE_MAX_S
    if late:
        text += _to_show("due", await due_deliveries(database, NAMED_MAX), owed.due)
    if owed.dead:
        text += _to_show("dead", await dead_deliveries(database, NAMED_MAX), owed.dead)
    return failing("callbacks", late or owed.dead > 0, text)


def _to_show(what: str, first: Sequence[Delivery], count: int) -> str:
    """The command that shows the first; "" if all were sent meanwhile."""
    ids = [delivery.event_id for delivery in first]
    return f": {what} {_named(ids, count)}: `payments callbacks show {ids[0]}`" if ids else ""


async def brake_check(database: Database, *, gives_back: bool) -> Check:
    """Checks whether the service has stopped giving back by itself. `gives_back`: UNFULFILLED is
    refund."""
    if not gives_back:
        text = "no automatic refunds: UNFULFILLED is not refund"
        return Check(state="off", name="brake", text=text)
    stop = await brake.stopped(database)
    if stop is None:
        text = f"{await brake.begun(database)} automatic refunds within the last hour"
        return Check(state="ok", name="brake", text=text)
    since = f"{stop.stopped_at:%Y-%m-%dT%H:%M:%SZ}"
    text = f"automatic refunds stopped at {since}: {stop.reason}"
    return Check(state="FAIL", name="brake", text=f"{text}: `payments giving-back resume`")
