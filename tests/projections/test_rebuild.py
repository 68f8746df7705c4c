"""Comparing the read model with the log, and writing what differs; nobody is disturbed."""

import asyncio
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import psycopg
import pytest

from payments.commands.settle import LATE_CAPTURE_S
from payments.database.connections import Database, DatabaseAddress
from payments.errors import StartError
from payments.events.facts import Legacy
from payments.events.store import SLICE_END
from payments.migrations import shape
from payments.observability.metrics import Telemetry
from payments.projections import comparison
from payments.projections import rebuild as module
from payments.projections.comparison import Difference, Unreadable
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from payments.projections.rebuild import Rebuilt, check, rebuild
from payments.snapshot import Reader, Snapshot
from tests.invariants.checker import TABLES
from tests.invariants.checker import check as check_invariants
from tests.support import History, append, append_stored, catch_up, histories, stored_event

Connection = psycopg.Connection[Any]
SETTLE_AFTER_S = 7.0
BEGAN_AT = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
def known(address: DatabaseAddress, connection: Connection) -> dict[str, History]:
    """Payments of every kind, some of an API client; the follower is up to date."""
    made = histories() | {
        f"of orders: {kind}": each for kind, each in histories("o", client="orders").items()
    }
    append(connection, [fact for history in made.values() for fact in history.facts])
    catch_up(address, seal=False)
    check_invariants(connection)
    return made


def rows(connection: Connection) -> dict[str, dict[uuid.UUID, tuple[Any, ...]]]:
    """Each row with the transaction that wrote it, by its key."""
    return {
        table: {
            row[1]: row
            for row in connection.execute(
                query.replace("SELECT ", "SELECT xmin::text, ", 1)
                .replace("created_at, updated_at", "created_at::text, updated_at::text")
                .encode()
            )
        }
        for table, query in TABLES.items()
    }


def rebuilt(address: DatabaseAddress) -> tuple[Rebuilt, list[str]]:
    found: list[Difference | Unreadable] = []
    done = rebuild(address, SETTLE_AFTER_S, found.append)
    return done, [str(each) for each in found]


def repaired(address: DatabaseAddress, connection: Connection) -> Rebuilt:
    """Rebuilds; then the tables are what the log says, and nothing is left to do."""
    differing = check(address).differing
    done, _ = rebuilt(address)
    assert done.differing == differing
    assert done.log == done.tables
    check_invariants(connection, caught_up=False)
    again = check(address)
    assert not any(again.differing.values())
    assert again.log == again.tables == done.log
    return done


def test_where_nothing_differs_nothing_is_written(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    before = rows(connection)
    done, found = rebuilt(address)
    assert (found, done.replaced, done.held_s, done.parked) == ([], 0, 0.0, 0)
    assert done.payments == len(known)
    assert done.events == done.position == sum(len(each.facts) for each in known.values())
    assert rows(connection) == before
    assert not connection.execute("SELECT FROM replaced_rows").fetchall()


# Statements that alter rows of one table, and how many differ then.
VANDALISM: dict[str, tuple[str, dict[str, int]]] = {
    "an amount": (
        "UPDATE payments SET amount_cents = 1 WHERE idempotency_key = 'key charged'",
        {"payments": 1},
    ),
    "nothing left in any column": (
        "UPDATE payments SET merchant_order_id = NULL, idempotency_key = NULL, status = NULL,"
        " amount_cents = NULL, currency = NULL, created_at = NULL, updated_at = NULL,"
        " provider_txn_id = NULL WHERE idempotency_key LIKE 'key refund%'",
        {"payments": 5},
    ),
    "times that never come": (
        "UPDATE payments SET created_at = 'infinity', updated_at = '-infinity'"
        " WHERE idempotency_key = 'key charged'",
        {"payments": 1},
    ),
    "a microsecond": (
        "UPDATE payments SET updated_at = updated_at + interval '1 microsecond'"
        " WHERE idempotency_key = 'key charged'",
        {"payments": 1},
    ),
    "keys exchanged": (
        "UPDATE payments SET idempotency_key = NULL WHERE idempotency_key = 'key charged';"
        " UPDATE payments SET idempotency_key = 'key charged'"
        "  WHERE idempotency_key = 'key declined';"
        " UPDATE payments SET idempotency_key = 'key declined' WHERE idempotency_key IS NULL",
        {"payments": 2},
    ),
    "a key on an invented row": (
        "UPDATE payments SET idempotency_key = NULL WHERE idempotency_key = 'key charged';"
        " INSERT INTO payments (idempotency_key) VALUES ('key charged')",
        {"payments": 2},
    ),
    "rows removed": (
        "DELETE FROM payments WHERE idempotency_key LIKE 'key refund%'",
        {"payments": 5},
    ),
    "a row invented": ("INSERT INTO payments DEFAULT VALUES", {"payments": 1}),
    "a refund of another payment": (
        "UPDATE refunds SET payment_id = (SELECT id FROM payments"
        " WHERE idempotency_key = 'key declined') WHERE status = 'FAILED' AND payment_id IN"
        " (SELECT id FROM payments WHERE idempotency_key = 'key refund failed')",
        {"refunds": 2},
    ),
    "a refund's status": (
        "UPDATE refunds SET status = 'SUCCESS', decline_code = 'x' WHERE status = 'FAILED'",
        {"refunds": 4},
    ),
    "refunds removed and invented": (
        "DELETE FROM refunds WHERE status = 'FAILED'; INSERT INTO refunds SELECT"
        " gen_random_uuid(), payment_id, idempotency_key, amount_cents, currency, status,"
        " provider_refund_id, decline_code, created_at, updated_at FROM refunds LIMIT 1",
        {"refunds": 5},
    ),
    "whose payment it is": (
        "UPDATE payment_clients SET client = 'evil' WHERE status = 'REFUNDED'",
        {"payment_clients": 3},
    ),
    "a client's payments": (
        "DELETE FROM payment_clients; INSERT INTO payment_clients"
        " SELECT id, 'evil', status, currency, created_at FROM payments"
        " WHERE idempotency_key = 'key charged'",
        {"payment_clients": 15},
    ),
    "what is left open": (
        "DELETE FROM unsettled_payments WHERE kind <> 'abandoned';"
        " INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " VALUES (gen_random_uuid(), 'charge', now(), now())",
        {"unsettled_payments": 9},
    ),
    "since when it is open": (
        "UPDATE unsettled_payments SET since = since - interval '1 hour', kind = 'refund'"
        " WHERE kind = 'charge'",
        {"unsettled_payments": 2},
    ),
}


@pytest.mark.parametrize("name", VANDALISM)
def test_what_was_altered_is_found_and_put_right(
    known: dict[str, History], address: DatabaseAddress, connection: Connection, name: str
) -> None:
    statements, differing = VANDALISM[name]
    before = rows(connection)
    connection.execute(statements.encode())
    altered = rows(connection)
    done = repaired(address, connection)
    assert {table: count for table, count in done.differing.items() if count} == differing
    after = rows(connection)
    for table in TABLES:
        # What was right is the very row that it was.
        same = {key for key, row in altered[table].items() if before[table].get(key) == row}
        assert {key: after[table][key] for key in same} == {key: before[table][key] for key in same}
        assert {key: row[1:] for key, row in after[table].items()} == {
            key: row[1:] for key, row in before[table].items()
        }
        # What stood there instead is kept.
        gone = {key for key in altered[table] if key not in same}
        query = "SELECT id FROM replaced_rows WHERE table_name = %s"
        assert {id for (id,) in connection.execute(query, [table]).fetchall()} == gone
    assert done.replaced == sum(
        connection.execute("SELECT count(*) FROM replaced_rows").fetchone() or ()
    )


def test_what_is_kept_is_the_row_as_it_was(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    payment_id = known["charged"].id
    connection.execute("UPDATE payments SET amount_cents = 15 WHERE id = %s", [payment_id])
    _, found = rebuilt(address)
    assert found == [f"payments {payment_id}: amount_cents is 15, the log says 1500"]
    query = "SELECT table_name, id, row FROM replaced_rows"
    ((table, id, row),) = connection.execute(query).fetchall()
    assert (table, id, row["amount_cents"], row["status"]) == (
        "payments",
        payment_id,
        15,
        "SUCCESS",
    )


def test_from_nothing(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    connection.execute("TRUNCATE payments, refunds, payment_clients, unsettled_payments")
    done = repaired(address, connection)
    assert done.differing["payments"] == len(known)
    # Also those that were abandoned long ago are not watched again: see the next test.
    assert done.replaced == 0


def test_an_abandoned_payment_is_watched_again_if_it_is_young(
    address: DatabaseAddress, connection: Connection
) -> None:
    """Settling forgets them in the end, and the log does not say whether it has."""
    now = connection.execute("SELECT now()").fetchone()
    assert now is not None
    young = History("young", began_at=now[0] - timedelta(hours=1)).abandoned()
    old = History("old", began_at=now[0] - timedelta(days=40)).abandoned()
    append(connection, [*young.facts, *old.facts])
    catch_up(address, seal=False)
    connection.execute("DELETE FROM unsettled_payments")
    assert not any(check(address).differing.values())
    done, found = rebuilt(address)
    assert (found, any(done.differing.values())) == ([], False)
    watched = connection.execute("SELECT payment_id FROM unsettled_payments").fetchall()
    assert watched == [(young.id,)]
    assert module.WATCHED_FOR.total_seconds() > LATE_CAPTURE_S


def test_what_settling_knows_is_left_alone(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    connection.execute("UPDATE unsettled_payments SET attempts = 5, due_at = '2100-01-01Z'")
    before = connection.execute("SELECT * FROM unsettled_payments ORDER BY 1").fetchall()
    connection.execute("UPDATE payments SET amount_cents = 1")
    repaired(address, connection)
    assert connection.execute("SELECT * FROM unsettled_payments ORDER BY 1").fetchall() == before


def test_a_follower_that_is_behind_is_no_difference(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    append(connection, [*History("late").charged().facts])
    done, found = rebuilt(address)
    assert (found, done.payments) == ([], len(known))
    assert not connection.execute("SELECT FROM payments WHERE idempotency_key = 'late'").fetchall()
    catch_up(address, seal=False)
    check_invariants(connection)


def test_a_parked_payment_stays_as_it_was_until_it_is_retried(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    damaged = known["charged"]
    append_stored(connection, [stored_event(damaged.id, 3, b"{", "PaymentRefunded")])
    lost = History("never applied")
    append_stored(connection, [stored_event(lost.id, 1, b"{", "PaymentInitiated")])
    catch_up(address, seal=False)
    before = rows(connection)
    assert not any(check(address).differing.values())
    connection.execute("UPDATE payments SET amount_cents = 1")
    done, _ = rebuilt(address)
    assert (done.parked, done.unreadable) == (2, [])
    after = rows(connection)["payments"]
    assert {key: row[1:] for key, row in after.items()} == {
        key: row[1:] for key, row in before["payments"].items()
    }


def test_a_payment_that_cannot_be_read_is_left_alone_and_told(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    damaged = known["charged"].id
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(
        "UPDATE payment_events SET state = '{' WHERE originator_id = %s AND originator_version = 2",
        [damaged],
    )
    connection.execute("UPDATE payments SET amount_cents = 1")
    done, found = rebuilt(address)
    (unreadable,) = done.unreadable
    assert unreadable.payment_id == damaged
    assert any(f"payment {damaged}: its events cannot be read" in each for each in found)
    left = connection.execute("SELECT id FROM payments WHERE amount_cents = 1").fetchall()
    assert left == [(damaged,)]


def between(monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Something happens between the first comparison and the writing."""
    catch_up_once = module._Rebuild._catch_up

    def patched(self: Any, few: int) -> bool:
        if not hasattr(self, "happened"):
            self.happened = True
            happens()
        return catch_up_once(self, few)

    monkeypatch.setattr(module._Rebuild, "_catch_up", patched)


@pytest.mark.parametrize("few", [0, 500])
def test_what_happens_meanwhile_is_taken_into_account(
    known: dict[str, History],
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
) -> None:
    """Caught up with before the follower is held, or while it is."""
    monkeypatch.setattr(module, "CATCH_UP_EVENTS", few)
    charged, pending = known["charged"], known["pending"]

    def happens() -> None:
        first = len(charged.facts)
        charged.refunded()
        pending.charged()
        append(connection, [*charged.facts[first:], pending.facts[-1], *History("new").facts])
        catch_up(address, seal=False)

    between(monkeypatch, happens)
    connection.execute("UPDATE payments SET amount_cents = 1")
    done, _ = rebuilt(address)
    # The follower wrote whole rows of three payments by itself.
    assert done.differing["payments"] == len(known) - 2
    assert done.log == done.tables
    check_invariants(connection)


def retry_parked(address: DatabaseAddress) -> None:
    """All that is parked can be read by now."""

    async def run() -> None:
        database = Database(address, 1)
        follower = Follower(database.connect, PaymentsProjection(7.0), Telemetry())
        assert await follower.retry_parked() == []
        await follower.close()

    asyncio.run(run())


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some payments each, of which two of a kind have many events."""
    small = SLICE_END.replace("OFFSET 9999", "OFFSET 4")
    assert small != SLICE_END
    monkeypatch.setattr(comparison, "SLICE_END", small)


@pytest.mark.parametrize(("number", "few"), [(1, 500), (2, 0), (5, 0), (9, 500), (9, 0)])
@pytest.mark.parametrize("repairs", [False, True])
def test_what_happens_between_two_slices_is_no_difference(
    known: dict[str, History],
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    small_slices: None,
    number: int,
    few: int,
    repairs: bool,
) -> None:
    """Every payment goes on, is parked or taken up, whether its slice was compared or not, and some
    while what changed is compared again; the totals are those of one moment all the same."""
    monkeypatch.setattr(module, "CATCH_UP_EVENTS", few)
    monkeypatch.setattr(comparison, "CHANGED_PAYMENTS", 3)
    real, slices = comparison._next_slice, []
    real_again, again = comparison.slice_of, []
    parked = known["partly refunded"].refund_begun().refund_succeeded()
    position = append(connection, parked.facts[-2:]) - 1
    connection.execute(
        "INSERT INTO parked_streams VALUES ('payments', %s, %s, 'a test')", [parked.id, position]
    )
    catch_up(address, seal=False)

    def happens() -> None:
        retry_parked(address)
        for history in known.values():
            first = len(history.facts)
            if history.payment.status == "PENDING":
                history.charged()
            elif history.payment.status == "SUCCESS" and history.payment.remaining_cents > 1:
                history.refunded(f"late {number}", 1)
            if facts := history.facts[first:]:
                append(connection, facts)
        append(connection, [f for n in range(9) for f in History(f"new {n}").charged().facts])
        damaged = known["refunded"]
        event = stored_event(damaged.id, len(damaged.facts) + 1, b"{", "PaymentRefunded")
        append_stored(connection, [event])
        catch_up(address, seal=False)
        connection.execute("DELETE FROM unsettled_payments WHERE kind = 'abandoned'")

    def disturbed(snapshot: Snapshot, first_id: uuid.UUID) -> Any:
        slices.append(first_id)
        if len(slices) == number:
            happens()
        return real(snapshot, first_id)

    def disturbed_again(snapshot: Snapshot, ids: list[uuid.UUID]) -> Any:
        again.append(ids)
        if len(again) == 2:
            charged = known["charged"].refunded("again", 1)
            append(connection, charged.facts[-2:])
            append(connection, History("newest").charged().facts)
            catch_up(address, seal=False)
        return real_again(snapshot, ids)

    monkeypatch.setattr(comparison, "_next_slice", disturbed)
    monkeypatch.setattr(comparison, "slice_of", disturbed_again)
    done = rebuilt(address)[0] if repairs else check(address)
    assert len(slices) > 9
    assert len(again) > (5 if few == 0 else 0)
    assert (done.differing, done.unreadable) == (dict.fromkeys(done.differing, 0), [])
    assert done.log == done.tables
    assert done.position == position_of_follower(connection)


def position_of_follower(connection: Connection) -> int:
    row = connection.execute("SELECT position FROM followers WHERE name = 'payments'").fetchone()
    assert row is not None
    return int(row[0])


def test_a_slice_has_whole_payments_and_no_payment_twice(
    known: dict[str, History], address: DatabaseAddress, small_slices: None
) -> None:
    """However many rows a payment has; rows without events, and the first and the last id, too."""
    with Reader(address, "tests") as reader:
        parts = list(comparison.slices(reader))
    assert len(parts) > 9
    streams = [{row[1] for row in part.events} for part in parts]
    assert sum(len(ids) for ids in streams) == len(set().union(*streams)) == len(known)
    found = [row[0] for part in parts for row in part.tables[0]]
    assert sorted(found) == sorted(history.id for history in known.values())


@pytest.mark.parametrize("place", [0, (1 << 128) - 1])
def test_rows_of_the_first_and_the_last_id(
    known: dict[str, History], address: DatabaseAddress, connection: Connection, place: int
) -> None:
    connection.execute("INSERT INTO payments (id) VALUES (%s)", [uuid.UUID(int=place)])
    done = repaired(address, connection)
    assert done.differing["payments"] == 1


def test_a_parked_payment_that_is_retried_meanwhile_is_not_put_back(
    known: dict[str, History],
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rows are newer then than what the first comparison saw; no event tells of it."""
    history = known["charged"].refunded()
    position = append(connection, history.facts[2:]) - 1
    connection.execute(
        "INSERT INTO parked_streams (follower, payment_id, position, reason)"
        " VALUES ('payments', %s, %s, 'a test')",
        [history.id, position],
    )
    catch_up(address, seal=False)

    between(monkeypatch, lambda: retry_parked(address))
    connection.execute("UPDATE payments SET amount_cents = 1")
    done, _ = rebuilt(address)
    assert done.parked == 0
    check_invariants(connection)
    query = "SELECT status FROM payments WHERE id = %s"
    assert connection.execute(query, [history.id]).fetchone() == ("REFUNDED",)


def test_a_failure_in_the_middle_of_writing_changes_nothing(
    known: dict[str, History],
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection.execute("UPDATE payments SET amount_cents = 1; DELETE FROM refunds")
    before = rows(connection)
    broken = (*module.REPLACE, "SELECT 1/0")
    monkeypatch.setattr(module, "REPLACE", broken)
    with pytest.raises(psycopg.Error):
        rebuilt(address)
    assert rows(connection) == before
    assert not connection.execute("SELECT FROM replaced_rows").fetchall()
    monkeypatch.undo()
    repaired(address, connection)


def test_a_second_one_says_who_runs(
    known: dict[str, History], address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def happens() -> None:
        with pytest.raises(StartError) as error:
            rebuild(address, SETTLE_AFTER_S)
        refused.append(str(error.value))
        assert not any(check(address).differing.values())  # looking is no rebuild

    between(monkeypatch, happens)
    rebuilt(address)
    (message,) = refused
    assert message.startswith("a rebuild is already running: payments rebuild ")
    assert ", since 2" in message
    rebuilt(address)


def test_checking_writes_nothing(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    connection.execute("UPDATE payments SET amount_cents = 1")
    before = rows(connection)
    statement = f"ALTER DATABASE {address.dbname} SET default_transaction_read_only = on"
    connection.execute(statement.encode())
    done = check(address)
    assert done.differing["payments"] == len(known)
    assert rows(connection) == before


# As an ORM does it that was told to synchronize: two of our columns stand behind its own now.
COLUMNS_OF_OTHERS = """
ALTER TABLE payments ADD seen boolean NOT NULL DEFAULT false,
    ADD number integer NOT NULL GENERATED ALWAYS AS IDENTITY,
    ADD twice integer GENERATED ALWAYS AS (amount_cents * 2) STORED,
    DROP COLUMN currency, DROP COLUMN created_at;
UPDATE payments SET seen = true
"""


def test_columns_that_others_added_stay_and_ours_may_stand_in_another_order(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    query = "SELECT id, seen, number, twice, currency, created_at FROM payments ORDER BY id"
    connection.execute(COLUMNS_OF_OTHERS)
    shape.restore(connection)
    theirs = "SELECT id, seen, number FROM payments WHERE status = 'SUCCESS' ORDER BY id"
    before = connection.execute(theirs).fetchall()
    gone = connection.execute("DELETE FROM payments WHERE status = 'FAILED'").rowcount
    repaired(address, connection)
    assert connection.execute(theirs).fetchall() == before
    read = connection.execute(query).fetchall()
    assert len(read) == len(known)
    assert [seen for _, seen, *_ in read].count(False) == gone
    payments = {history.id: history.payment for history in known.values()}
    for id, _, _, twice, currency, created_at in read:
        of_log = payments[id]
        assert (twice, currency) == (of_log.amount_cents * 2, of_log.currency)
        assert created_at.replace(tzinfo=UTC) == of_log.created_at


def test_a_time_that_the_log_has_in_another_zone_is_written_in_utc(
    address: DatabaseAddress, connection: Connection
) -> None:
    """By the follower and by the rebuild alike."""
    elsewhere = BEGAN_AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    begun = msgspec.structs.replace(
        History("k", began_at=BEGAN_AT).facts[0],
        legacy=Legacy(uuid.uuid4(), "txn", elsewhere + timedelta(hours=1)),
    )
    append(connection, [begun])
    catch_up(address, seal=False)
    query = "SELECT updated_at FROM payments"
    expected = [(BEGAN_AT.replace(tzinfo=None) + timedelta(hours=1),)]
    assert connection.execute(query).fetchall() == expected
    connection.execute("DELETE FROM payments")
    rebuilt(address)
    assert connection.execute(query).fetchall() == expected
    assert not any(check(address).differing.values())


STRANGERS = """
CREATE TABLE tickets (payment_id uuid REFERENCES payments (id) ON DELETE CASCADE);
INSERT INTO tickets SELECT id FROM payments;
CREATE VIEW revenue AS SELECT sum(amount_cents) AS cents FROM payments WHERE status = 'SUCCESS';
CREATE INDEX strangers ON payments (provider_txn_id);
CREATE TABLE seen (id uuid);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO seen VALUES (NEW.id); RETURN NEW; END';
CREATE TRIGGER strangers AFTER UPDATE ON payments FOR EACH ROW EXECUTE FUNCTION see();
CREATE ROLE reporting_{0};
GRANT SELECT ON payments, revenue TO reporting_{0};
"""


@pytest.fixture
def stranger(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> Iterator[Connection]:
    """Somebody else's session, as a role that may only read, with a statement prepared."""
    connection.execute(STRANGERS.format(address.dbname).encode())
    with psycopg.connect(address.conninfo("stranger"), autocommit=True) as opened:
        opened.execute(f"SET ROLE reporting_{address.dbname}".encode())
        opened.execute("PREPARE of_status AS SELECT count(*) FROM payments WHERE status = $1")
        yield opened
    connection.execute(f"DROP OWNED BY reporting_{address.dbname}".encode())
    connection.execute(f"DROP ROLE reporting_{address.dbname}".encode())


def test_strangers_go_on_working(
    stranger: Connection, address: DatabaseAddress, connection: Connection
) -> None:
    def look() -> list[Any]:
        return [
            stranger.execute("SELECT cents FROM revenue").fetchone(),
            stranger.execute("EXECUTE of_status ('SUCCESS')").fetchone(),
            connection.execute("SELECT count(*) FROM tickets").fetchone(),
            connection.execute("SELECT 'payments'::regclass::oid").fetchone(),
            connection.execute(
                "SELECT indisvalid FROM pg_index WHERE indexrelid = 'strangers'::regclass"
            ).fetchone(),
        ]

    before = look()
    connection.execute("UPDATE payments SET status = 'SUCCESS', amount_cents = 10")
    assert look() != before
    repaired(address, connection)
    assert look() == before
    assert connection.execute("SELECT count(*) FROM seen").fetchone() != (0,)


def test_nobody_waits_for_it(
    known: dict[str, History],
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All is written, and not committed yet: everybody reads what was there before, at once."""
    connection.execute("UPDATE payments SET amount_cents = 1")
    looked = []

    class Looking(str):
        """The last statement of the transaction; before it is sent, a stranger looks."""

        def encode(self, *_: str) -> bytes:
            with psycopg.connect(address.conninfo("stranger"), autocommit=True) as other:
                other.execute("SET lock_timeout = '1s'; SET statement_timeout = '1s'")
                query = "SELECT count(*) FROM payments WHERE amount_cents = 1"
                looked.append(other.execute(query).fetchone())
            return super().encode()

    monkeypatch.setattr(module, "REPLACE", (*module.REPLACE, Looking("SELECT 1")))
    repaired(address, connection)
    assert looked == [(len(known),)]


def test_rows_of_a_snapshot_are_those_of_one_moment(
    known: dict[str, History], address: DatabaseAddress, connection: Connection
) -> None:
    query = "SELECT count(*) FROM payments"

    def read(snapshot: Snapshot) -> list[list[tuple[Any, ...]]]:
        first = snapshot.fetch(query)
        connection.execute("DELETE FROM payments")
        return [first, snapshot.fetch(query)]

    with Reader(address, "tests") as reader:
        first, second = reader.at_one_moment(read)
        assert first == second == [(len(known),)]
        assert reader.fetch(query) == [(0,)]
