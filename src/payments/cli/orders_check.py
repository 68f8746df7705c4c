"""The check of `payments doctor` for paid orders that may not be fulfilled."""

from payments.cli.checks import SUSPECT_MAX_S, UNFULFILLED_MAX_S, Check, failing
from payments.database.connections import Database
from payments.queries.fulfilments import OPEN_STATES, Count, counts, unfulfilled

NAMED_MAX = 3  # payments in the line
LIST = "`payments callbacks list --unfulfilled`"
UNSET = "ORDER_STATUS_URL is not set: set it to request the status: docs/order-service.md"


async def orders_check(database: Database, *, calls_back: bool, asks: bool) -> Check:
    """`asks`: whether ORDER_STATUS_URL is set. Suspects may wait for a status for SUSPECT_MAX_S,
    and unfulfilled payments for their refund for UNFULFILLED_MAX_S. Orders whose status cannot be
    known are not a failure."""
    found = await counts(database)
    suspect, silent = found["suspect"], found["silent"]
    late = (
        found["paid_twice"].payments > 0
        or found["unfulfilled"].oldest_age_s > UNFULFILLED_MAX_S
        or suspect.oldest_age_s > SUSPECT_MAX_S
    )
    told = [_of(found[state], state) for state in OPEN_STATES if found[state].payments]
    if silent.payments:
        told.append(f"{silent.payments} whose response did not contain it")
    if not told:
        return Check(state="ok", name="orders", text="no payment is known to be unfulfilled")
    text = f"paid, and perhaps not fulfilled: {', '.join(told)}"
    if sum(found[state].payments for state in OPEN_STATES):
        first = await unfulfilled(database, OPEN_STATES, NAMED_MAX)
        text += f"; {', '.join(str(each.payment_id) for each in first)}: {LIST}"
    if (silent.payments or suspect.payments) and calls_back and not asks:
        text += f"; {UNSET}"
        if not late:
            return Check(state="off", name="orders", text=text)
    return failing("orders", late, text)


def _of(count: Count, state: str) -> str:
    return f"{count.payments} {state}, the oldest for {count.oldest_age_s:.0f} s"
