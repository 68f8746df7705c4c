"""`payments export`: what money moved, for spreadsheets."""

import csv
import io
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from click.testing import Result

from payments.cli.export import COLUMNS
from payments.money import DECIMALS
from tests.support import ORDER_ID, History, append, append_stored, spread, stored_event

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]
ALL = ("--from", "2020-01-01T00:00:00Z", "--to", "2100-01-01T00:00:00Z")


def rows(done: Result) -> list[dict[str, str]]:
    assert done.exit_code == 0, done.output
    return list(csv.DictReader(io.StringIO(done.stdout_bytes.decode(), newline="")))


def test_a_row_for_each_movement_and_none_for_anything_else(
    operator: Operator, connection: Connection
) -> None:
    paid = History("=1+1", client="orders").charged().refunded("r1", 500).refunded(None, 1000)
    late = History("late", 7, currency="JPY").abandoned()
    late.late_capture_found().late_capture_returned()
    fils = History("fils", 1005, currency="KWD", client="orders").charged()
    refused = History("refused").charged().refund_begun().refund_failed("account_closed")
    for history in (paid, late, fils, refused, History("open"), History("no").declined("lost")):
        append(connection, history.facts)
    found = rows(operator("export", *ALL))
    assert tuple(found[0]) == COLUMNS
    first, second = (refund.id for refund in paid.payment.refunds)
    shown = [
        tuple(row[name] for name in ("payment", "kind", "amount", "currency", "refund", "key"))
        for row in found
    ]
    returned = late.facts[-1].refund_id  # type: ignore[attr-defined]
    assert shown == [
        (str(paid.id), "charge", "15.00", "INR", "", "'=1+1"),  # no spreadsheet runs it
        (str(paid.id), "refund", "5.00", "INR", str(first), "r1"),
        (str(paid.id), "refund", "10.00", "INR", str(second), ""),
        (str(late.id), "charge", "7", "JPY", "", "late"),
        (str(late.id), "refund", "7", "JPY", str(returned), ""),
        (str(fils.id), "charge", "1.005", "KWD", "", "fils"),
        (str(refused.id), "charge", "15.00", "INR", "", "refused"),
    ]
    assert [row["client"] for row in found[:3]] == ["orders"] * 3
    assert found[4]["client"] == late.facts[-1].client
    assert {row["order"] for row in found} == {str(ORDER_ID)}
    charged, given_back = paid.facts[1], paid.facts[3]
    assert found[0]["provider_id"] == charged.provider_txn_id  # type: ignore[attr-defined]
    assert found[1]["provider_id"] == given_back.provider_refund_id  # type: ignore[attr-defined]


def test_a_month_by_the_time_of_recording(operator: Operator, connection: Connection) -> None:
    """Who asked for it may have done so long before."""
    append(connection, [fact for n in range(3) for fact in History(f"k{n}").charged().facts])
    times = spread(connection, 0, 1, 2, 3599, 3600, 3600)
    month = ("--from", times[0].isoformat(), "--to", "2026-02-01T00:00:00Z")
    assert [row["key"] for row in rows(operator("export", *month))] == ["k0", "k1"]
    (row,) = rows(operator("export", "--from", "2026-02-01T05:30:00+05:30", *ALL[2:]))
    assert (row["key"], row["time"]) == ("k2", "2026-02-01 00:00:00")
    before = (times[1] + timedelta(microseconds=1)).isoformat()
    assert [row["key"] for row in rows(operator("export", "--from", before, *ALL[2:]))] == [
        *("k1", "k2")
    ]
    assert datetime.strptime(row["time"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) == times[5]
    nothing = operator("export", "--from", "2020-01-01T00:00:00Z", "--to", "2020-02-01T00:00:00Z")
    assert nothing.stdout_bytes == (",".join(COLUMNS) + "\r\n").encode()


def test_more_than_a_part_of_them(operator: Operator, connection: Connection) -> None:
    histories = [History(f"k{n}", n + 1).charged().refunded("r", 1) for n in range(130)]
    append(connection, [fact for history in histories for fact in history.facts])
    found = rows(operator("export", *ALL))
    assert [(row["kind"], row["key"]) for row in found] == [
        pair for n in range(130) for pair in (("charge", f"k{n}"), ("refund", "r"))
    ]
    assert found[-2]["amount"] == "1.30"


def test_what_cannot_be_read_is_named(operator: Operator, connection: Connection) -> None:
    paid = History("k").charged()
    append(connection, paid.facts)
    append_stored(connection, [stored_event(paid.id, 3, b"{", "PaymentRefunded")])
    odd = uuid.uuid4()
    append_stored(connection, [stored_event(odd, 1, b"{", "PaymentInitiated")])
    done = operator("export", *ALL)
    assert (done.exit_code, done.stderr) == (1, "not readable: the event at position 3\n")
    assert done.stdout.count("\n") == 2


def test_a_currency_of_a_newer_version_ends_nothing(
    operator: Operator, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(connection, [*History("a").charged().facts, *History("b").charged().facts])
    monkeypatch.delitem(DECIMALS, "INR")
    done = operator("export", *ALL)
    assert done.exit_code == 1
    assert done.stderr.count("the currency 'INR' is not known\n") == 2
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ALL[:2],
        ("--from", "5", "--to", "9"),
        ("--from", "2026-02-01T00:00:00Z", "--to", "2026-01-01T00:00:00Z"),
        ("--from", "2026-01-01", "--to", "2026-02-01"),
    ],
    ids=["none", "no end", "positions", "backwards", "no offset"],
)
def test_wrong_times(operator: Operator, arguments: tuple[str, ...]) -> None:
    done = operator("export", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
