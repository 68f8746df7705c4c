"""The function that writes the log: what it believes, what it counts, and what it refuses."""

import asyncio
import threading
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psutil
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments import migrations
from payments.database.connections import Database, DatabaseAddress
from payments.events.appender import Appender, CaptureTaken, ReferenceTaken
from payments.events.facts import Fact, PaymentCharged, PaymentInitiated
from payments.events.store import APPEND, SHARED_CAPTURES, append_params, to_stored_event
from payments.migrations import migrate
from payments.observability.metrics import Telemetry
from tests.outside_postgres import OutsidePostgres
from tests.support import PATIENCE_S, History, append, stored_event, until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

# As software before migration 0007 calls it.
APPEND_BEFORE = """
SELECT outcome, "position", first_state
  FROM append_payment_events(%b::uuid[], %b::bigint[], %b::integer[],
                             %b::integer[], %b::text[], %b::bytea[])
"""

ALL = {"first": 1, "last": 1 << 62}


def outcomes(connection: Connection, *appends: Sequence[Fact]) -> list[tuple[str, int | None]]:
    params = append_params([[to_stored_event(fact) for fact in facts] for facts in appends])
    rows = connection.execute(APPEND, params).fetchall()
    return [(outcome, position) for outcome, position, _ in rows]


def append_at(connection: Connection, event: StoredEvent, told: datetime | None) -> datetime:
    """Appends with the application's clock at `told`; when the event was recorded."""
    *params, _ = append_params([[event]])
    connection.execute(APPEND, [*params, told])
    row = connection.execute(
        "SELECT recorded_at FROM payment_events WHERE originator_id = %s", [event.originator_id]
    ).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def force(connection: Connection, statement: str, *params: Any) -> None:
    """As only a superuser can."""
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(statement.encode(), params)
    connection.execute(
        "ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only"
    )


def naming(transaction: str, key: str, gateway: str = "simulated") -> list[Fact]:
    """A payment whose capture the provider calls so."""
    initiated, charged = History(key).charged().facts
    return [
        msgspec.structs.replace(initiated, gateway=gateway),
        msgspec.structs.replace(charged, provider_txn_id=transaction),
    ]


class TestCaptures:
    def test_one_that_another_payment_names_is_refused(self, connection: Connection) -> None:
        first, second = naming("t-1", "a"), naming("t-1", "b")
        append(connection, [*first, second[0]])
        assert outcomes(connection, [second[1]]) == [("captured", None)]
        assert outcomes(connection, [first[1]]) == [("repeated", 2)]

    def test_of_two_in_one_batch_the_first_is_taken(self, connection: Connection) -> None:
        first, second, third = naming("t-1", "a"), naming("t-1", "b"), naming("t-2", "c")
        append(connection, [first[0], second[0], third[0]])
        assert outcomes(connection, [first[1]], [second[1]], [third[1]]) == [
            ("appended", 4),
            ("captured", None),
            ("appended", 5),
        ]

    def test_a_whole_payment_in_one_append_is_refused(self, connection: Connection) -> None:
        append(connection, naming("t-1", "a"))
        assert outcomes(connection, naming("t-1", "b")) == [("captured", None)]
        assert outcomes(connection, naming("t-2", "b")) == [("appended", 4)]

    def test_a_stream_that_moved_on_is_a_conflict_first(self, connection: Connection) -> None:
        """Its caller decides again, on the stream as it is."""
        first, second = naming("t-1", "a"), naming("t-1", "b")
        append(connection, [*first, second[0], History("b").abandoned().facts[1]])
        assert outcomes(connection, [second[1]]) == [("conflict", None)]

    def test_a_late_capture_is_one_too(self, connection: Connection) -> None:
        append(connection, naming("t-1", "a"))
        *before, found = History("b").abandoned().late_capture_found().facts
        append(connection, before)
        found = msgspec.structs.replace(found, provider_txn_id="t-1")
        assert outcomes(connection, [found]) == [("captured", None)]

    def test_another_provider_may_call_its_own_the_same(self, connection: Connection) -> None:
        append(connection, naming("t-1", "a"))
        initiated, charged = naming("t-1", "b", gateway="another")
        append(connection, [initiated])
        assert outcomes(connection, [charged]) == [("appended", 4)]
        assert connection.execute(SHARED_CAPTURES.encode(), ALL).fetchall() == []

    @pytest.mark.parametrize(
        "transaction", ['a"b', "a\\b", '","provider_txn_id":"t-1', "%", "x" * 255, "'"]
    )
    def test_whatever_a_provider_calls_them(self, connection: Connection, transaction: str) -> None:
        append(connection, [*naming("t-1", "a"), *naming(transaction, "b")])
        append(connection, naming(transaction, "c")[:1])
        assert outcomes(connection, naming(transaction, "c")[1:]) == [("captured", None)]

    def test_nobody_pretends_to_be_the_field(self, connection: Connection) -> None:
        """What comes from outside stands in the bytes too, with its quotation marks escaped."""
        append(connection, naming("t-1", "a"))
        initiated, charged = naming("t-2", "b")
        words = '","provider_txn_id":"t-1"'
        appended = [
            msgspec.structs.replace(initiated, request_id=words),
            msgspec.structs.replace(charged, request_id=words),
        ]
        assert outcomes(connection, appended) == [("appended", 4)]

    def test_bytes_that_name_none_are_never_shared(self, connection: Connection) -> None:
        for _ in range(2):
            event = stored_event(state=b"\x00\xff", topic="PaymentCharged")
            rows = connection.execute(APPEND, append_params([[event]])).fetchall()
            assert rows[0][0] == "appended"

    def test_software_from_before_is_not_told_what_it_does_not_know(
        self, connection: Connection
    ) -> None:
        """Its second payment is stored, and found by the audit."""
        first, second = naming("t-1", "a"), naming("t-1", "b")
        append(connection, [*first, second[0]])
        params = append_params([[to_stored_event(second[1])]])[:6]
        assert connection.execute(APPEND_BEFORE, params).fetchall() == [("appended", 4, None)]
        assert connection.execute(SHARED_CAPTURES.encode(), ALL).fetchall() == [
            (second[0].payment_id, first[0].payment_id, "simulated", "t-1")
        ]

    async def test_the_appender_tells_its_caller(self, database: Database) -> None:
        appender = Appender(database.connect, Telemetry(), intent_queue_max=10)
        appender.start()
        first, second = naming("t-1", "a"), naming("t-1", "b")
        for fact in (*first, second[0]):
            await appender.append([to_stored_event(fact)])
        with pytest.raises(CaptureTaken):
            await appender.append([to_stored_event(second[1])])
        await appender.stop(1)

    async def test_of_two_that_race_one_is_stored(
        self, database: Database, connection: Connection
    ) -> None:
        appenders = [Appender(database.connect, Telemetry(), 100) for _ in range(2)]
        payments = [naming("t-1", f"k{number}") for number in range(8)]
        append(connection, [initiated for initiated, _ in payments])
        for appender in appenders:
            appender.start()
        told = await asyncio.gather(
            *(
                appenders[number % 2].append([to_stored_event(charged)])
                for number, (_, charged) in enumerate(payments)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(each, CaptureTaken) for each in told) == 7
        for appender in appenders:
            await appender.stop(1)

    def test_the_function_and_the_index_read_the_same(self, connection: Connection) -> None:
        """Or it would read the whole log under its lock."""
        connection.execute("SET enable_seqscan = off")
        plan = connection.execute(
            "EXPLAIN SELECT FROM payment_events WHERE captured_transaction(state) = 't'"
            " AND topic IN ('PaymentCharged', 'LateCaptureFound')"
        ).fetchall()
        assert "payment_events_capture" in str(plan)

    def test_it_finds_what_the_facts_say(self, connection: Connection) -> None:
        """The fields' names are part of the stored form, which is fixed for ever."""
        initiated, charged = naming("t-1", "a")
        assert isinstance(charged, PaymentCharged)
        row = connection.execute(
            "SELECT initiated_gateway(%s), captured_transaction(%s)",
            [to_stored_event(initiated).state, to_stored_event(charged).state],
        ).fetchone()
        assert row == ("simulated", "t-1")


def referring(reference: str, key: str, gateway: str = "simulated") -> PaymentInitiated:
    """The intent of a payment whose method names this reference."""
    (initiated,) = History(key).facts
    assert isinstance(initiated, PaymentInitiated)
    return msgspec.structs.replace(initiated, gateway=gateway, provider_reference=reference)


def prepared(reference: str, key: str) -> list[Fact]:
    """A payment that the provider gave this reference."""
    return list(History(key).referenced(reference).facts)


def claims(connection: Connection) -> list[tuple[str, str, uuid.UUID]]:
    return connection.execute(
        "SELECT gateway, reference, payment_id FROM provider_references ORDER BY 1, 2"
    ).fetchall()


class TestReferences:
    def test_one_that_another_payment_has_is_claimed(self, connection: Connection) -> None:
        first, second = referring("pay_1", "a"), referring("pay_1", "b")
        assert outcomes(connection, [first]) == [("appended", 1)]
        assert outcomes(connection, [second]) == [("claimed", None)]
        assert outcomes(connection, [first]) == [("repeated", 1)]
        assert claims(connection) == [("simulated", "pay_1", first.payment_id)]
        stored = connection.execute("SELECT originator_id FROM payment_events").fetchall()
        assert stored == [(first.payment_id,)]
        other = msgspec.structs.replace(second, provider_reference="pay_2")
        assert outcomes(connection, [other]) == [("appended", 2)]

    def test_of_two_in_one_batch_the_first_has_it(self, connection: Connection) -> None:
        first, second, third = (
            referring(reference, key)
            for reference, key in (("pay_1", "a"), ("pay_1", "b"), ("pay_2", "c"))
        )
        assert outcomes(connection, [first], [second], [third]) == [
            ("appended", 1),
            ("claimed", None),
            ("appended", 2),
        ]

    def test_another_provider_may_give_the_same(self, connection: Connection) -> None:
        first, second = referring("pay_1", "a"), referring("pay_1", "b", gateway="another")
        assert outcomes(connection, [first], [second]) == [("appended", 1), ("appended", 2)]
        assert [gateway for gateway, _, _ in claims(connection)] == ["another", "simulated"]

    def test_what_the_provider_gave_is_claimed_too(self, connection: Connection) -> None:
        first, second = prepared("pi_1", "a"), prepared("pi_1", "b")
        append(connection, [first[0], second[0]])
        assert outcomes(connection, first[1:]) == [("appended", 3)]
        assert outcomes(connection, second[1:]) == [("claimed", None)]
        assert outcomes(connection, [referring("pi_1", "c")]) == [("claimed", None)]
        assert claims(connection) == [("simulated", "pi_1", first[0].payment_id)]

    @pytest.mark.parametrize("apart", [False, True], ids=["one append", "two appends"])
    def test_several_events_in_one_batch(self, connection: Connection, apart: bool) -> None:
        """The provider's name is in an event that is not stored yet."""
        first, second = prepared("pi_1", "a"), prepared("pi_1", "b")
        appends = [first[:1], first[1:]] if apart else [first]
        assert {each for each, _ in outcomes(connection, *appends)} == {"appended"}
        assert claims(connection) == [("simulated", "pi_1", first[0].payment_id)]
        assert outcomes(connection, second) == [("claimed", None)]
        assert outcomes(connection, first) == [("repeated", 2)]

    def test_the_reference_of_a_later_event_of_an_append(self, connection: Connection) -> None:
        append(connection, [referring("pi_1", "a")])
        whole = History("b").referenced("pi_1").charged().facts
        assert outcomes(connection, whole) == [("claimed", None)]

    def test_a_conflict_claims_nothing(self, connection: Connection) -> None:
        append(connection, History("a").abandoned().facts)
        *_, stale = prepared("pi_1", "a")
        assert outcomes(connection, [stale]) == [("conflict", None)]
        again = referring("pay_1", "a")
        assert outcomes(connection, [again]) == [("conflict", None)]
        assert claims(connection) == []

    def test_neither_does_a_capture_that_another_payment_names(
        self, connection: Connection
    ) -> None:
        append(connection, naming("t-1", "a"))
        *intent, charged = History("b").referenced("pi_1").charged().facts
        charged = msgspec.structs.replace(charged, provider_txn_id="t-1")
        assert outcomes(connection, [*intent, charged]) == [("captured", None)]
        assert claims(connection) == []

    @pytest.mark.parametrize("words", ['","provider_reference":"pay_1', '"provider_reference":"p"'])
    def test_nobody_pretends_to_be_the_field(self, connection: Connection, words: str) -> None:
        """What comes from outside stands in the bytes too, with its quotation marks escaped."""
        append(connection, [referring("pay_1", "a"), *prepared("p", "b")])
        before = claims(connection)
        (initiated,) = History("c").facts
        imitating = msgspec.structs.replace(initiated, request_id=words, idempotency_key=words)
        assert outcomes(connection, [imitating]) == [("appended", 4)]
        assert claims(connection) == before

    def test_software_from_before_is_not_told_what_it_does_not_know(
        self, connection: Connection
    ) -> None:
        first, second = referring("pay_1", "a"), referring("pay_1", "b")
        append(connection, [first])
        params = append_params([[to_stored_event(second)]])[:6]
        assert connection.execute(APPEND_BEFORE, params).fetchall() == [("appended", 2, None)]
        assert claims(connection) == [("simulated", "pay_1", first.payment_id)]

    async def test_of_processes_that_race_one_has_it(self, database: Database) -> None:
        appenders = [Appender(database.connect, Telemetry(), 100) for _ in range(2)]
        for appender in appenders:
            appender.start()
        told = await asyncio.gather(
            *(
                appenders[number % 2].append_intent(
                    to_stored_event(referring("pay_1", f"k{number}"))
                )
                for number in range(8)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(each, ReferenceTaken) for each in told) == 7
        assert [each for each in told if not isinstance(each, ReferenceTaken)] == [1]
        for appender in appenders:
            await appender.stop(1)

    def test_it_finds_what_the_facts_say(self, connection: Connection) -> None:
        """The field's name is part of the stored form, which is fixed for ever."""
        facts = [referring("pay_1", "a"), *History("b").referenced("pi_1").charged().facts]
        found = [
            connection.execute(
                "SELECT stored_reference(%s)", [to_stored_event(fact).state]
            ).fetchone()
            for fact in facts
        ]
        assert found == [("pay_1",), ("",), ("pi_1",), ("",)]


class TestPredecessors:
    @pytest.mark.parametrize(
        ("predecessor", "outcome"), [(0, "appended"), (1, "conflict"), (None, "appended")]
    )
    def test_the_event_before_is_the_one_that_the_caller_knows(
        self, connection: Connection, predecessor: int | None, outcome: str
    ) -> None:
        """A log that went back may have grown again to the same version."""
        histories = [History("k").charged(), History("k").charged()]
        append(connection, histories[0].facts[:1])
        firsts = [to_stored_event(history.facts[0]).state for history in histories]
        known = None if predecessor is None else firsts[predecessor]
        params = append_params([[to_stored_event(histories[0].facts[1])]], [known])
        ((found, _, _),) = connection.execute(APPEND, params).fetchall()
        assert found == outcome

    def test_within_a_batch_too(self, connection: Connection) -> None:
        """Another request's intent, and behind it the outcome of the one that was lost."""
        lost, other = History("k").charged(), History("k", 999)
        events = [to_stored_event(fact) for fact in (other.facts[0], *lost.facts)]
        appends = [[events[0]], [events[2]]]
        for predecessor, outcome in ((events[1].state, "conflict"), (events[0].state, "appended")):
            with connection.transaction(force_rollback=True):
                params = append_params(appends, [None, predecessor])
                found = [row[0] for row in connection.execute(APPEND, params).fetchall()]
                assert found == ["appended", outcome]

    def test_one_that_stands_there_already_is_repeated(self, connection: Connection) -> None:
        events = [to_stored_event(fact) for fact in History("k").charged().facts]
        for outcome in ("appended", "repeated"):
            if outcome == "appended":
                connection.execute(APPEND, append_params([events[:1]]))
            params = append_params([events[1:]], [events[0].state])
            assert connection.execute(APPEND, params).fetchall() == [(outcome, 2, None)]


class TestClocks:
    def test_the_databases_clock_counts_while_both_agree(self, connection: Connection) -> None:
        told = datetime.now(UTC) - timedelta(seconds=50)
        recorded = append_at(connection, stored_event(), told)
        assert abs((recorded - datetime.now(UTC)).total_seconds()) < 20

    @pytest.mark.parametrize("apart_s", [90, 3600, 400 * 86_400])
    def test_of_two_that_are_far_apart_the_earlier_counts(
        self, connection: Connection, apart_s: int
    ) -> None:
        """For the function the database's clock is ahead if the application's is behind."""
        earlier = datetime.now(UTC) - timedelta(seconds=apart_s)
        assert append_at(connection, stored_event(), earlier) == earlier
        later = datetime.now(UTC) + timedelta(seconds=apart_s)
        recorded = append_at(connection, stored_event(), later)
        assert abs((recorded - datetime.now(UTC)).total_seconds()) < 20

    def test_but_not_below_the_last_stamp(self, connection: Connection) -> None:
        last = append_at(connection, stored_event(), None)
        earlier = datetime.now(UTC) - timedelta(days=1)
        assert append_at(connection, stored_event(), earlier) == last

    @pytest.mark.parametrize("forced", ["infinity", "9999-12-31Z"])
    def test_no_stamp_of_somebody_else_refuses_an_append(
        self, connection: Connection, forced: str
    ) -> None:
        append_at(connection, stored_event(), None)
        connection.execute("ALTER TABLE payment_events DROP CONSTRAINT payment_events_sane")
        force(connection, "UPDATE payment_events SET recorded_at = %s", forced)
        connection.execute(
            "ALTER TABLE payment_events ADD CONSTRAINT payment_events_sane"
            " CHECK (recorded_at BETWEEN '2000-01-01Z' AND '2200-01-01Z') NOT VALID"
        )
        assert append_at(connection, stored_event(), datetime.now(UTC)).year == 2200

    @pytest.mark.parametrize(
        "told", [datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)]
    )
    def test_no_clock_refuses_one(self, connection: Connection, told: datetime) -> None:
        assert append_at(connection, stored_event(), told).year in (2000, datetime.now(UTC).year)


class TestWhatIsBelieved:
    @pytest.mark.parametrize(
        "swallowing",
        [
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER swallow BEFORE INSERT ON payment_events"
            " FOR EACH ROW EXECUTE FUNCTION swallow()",
            "CREATE RULE swallow AS ON INSERT TO payment_events DO INSTEAD NOTHING",
        ],
        ids=["trigger", "rule"],
    )
    async def test_an_append_that_is_swallowed_waits(
        self, database: Database, connection: Connection, swallowing: str
    ) -> None:
        """It was answered as stored before; now it goes through once the cause is gone."""
        connection.execute(swallowing.encode())
        telemetry = Telemetry()
        appender = Appender(database.connect, telemetry, intent_queue_max=10)
        appender.start()
        waiting = appender.append([stored_event()])
        retried = telemetry.append_failures["retried"]
        await until(lambda: retried._value.get() >= 2)
        assert not waiting.done()
        connection.execute("DROP FUNCTION IF EXISTS swallow CASCADE")
        connection.execute("DROP RULE IF EXISTS swallow ON payment_events")
        assert await asyncio.wait_for(waiting, PATIENCE_S) == 1
        await appender.stop(1)

    @pytest.mark.parametrize("sqlstate", ["22003", "22008", "23505", "23514", "09000"])
    async def test_what_is_not_about_the_data_drops_nothing(
        self, database: Database, connection: Connection, sqlstate: str
    ) -> None:
        """Positions, versions and times are the function's own: somebody else is at fault."""
        failing = (
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE EXCEPTION 'not the data' USING ERRCODE = '{sqlstate}'; END $$;"
            "CREATE TRIGGER fail BEFORE INSERT ON payment_events"
            " FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        connection.execute(failing.encode())
        telemetry = Telemetry()
        appender = Appender(database.connect, telemetry, intent_queue_max=10)
        appender.start()
        waiting = appender.append([stored_event()])
        await until(lambda: telemetry.append_failures["retried"]._value.get() >= 2)
        assert not waiting.done()
        connection.execute("DROP FUNCTION fail CASCADE")
        assert await asyncio.wait_for(waiting, PATIENCE_S) == 1
        await appender.stop(1)

    @pytest.mark.parametrize(
        "values",
        [
            "9223372036854775807, gen_random_uuid(), 1, '', '', now()",
            "0, gen_random_uuid(), 1, '', '', now()",
            "1, gen_random_uuid(), 1, '', '', 'infinity'",
            "1, gen_random_uuid(), 1, '', '', '-infinity'",
            "1, gen_random_uuid(), 1, '', '', '9999-01-01Z'",
            "1, gen_random_uuid(), -1, '', '', now()",
            "1, gen_random_uuid(), 9223372036854775807, '', '', now()",
        ],
    )
    def test_the_table_refuses_what_is_absurd(self, connection: Connection, values: str) -> None:
        with pytest.raises(psycopg.errors.CheckViolation, match="payment_events_sane"):
            connection.execute(f"INSERT INTO payment_events VALUES ({values})".encode())

    def test_a_table_with_such_a_row_is_migrated(
        self, empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = migrations.known_migrations()
        with monkeypatch.context() as before:
            before.setattr(migrations, "known_migrations", lambda: known[:5])
            migrate(empty_database)
        with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
            connection.execute(
                "INSERT INTO payment_events VALUES (1, gen_random_uuid(), 1, '', '', 'infinity')"
            )
            migrate(empty_database)
            assert append(connection, History("k").facts) == 2

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [("append_payment_events", 9), ("append_payment_events", 6), ("add_log_seals", 2)],
    )
    def test_what_runs_as_the_owner_is_pinned_and_not_for_everyone(
        self, connection: Connection, name: str, arguments: int
    ) -> None:
        row = connection.execute(
            "SELECT prosecdef, proconfig::text,"
            "       has_function_privilege('pg_monitor', oid, 'EXECUTE')"
            "  FROM pg_proc WHERE proname = %s AND pronargs = %s",
            [name, arguments],
        ).fetchone()
        assert row is not None
        definer, settings, for_everyone = row
        assert definer
        assert "search_path=pg_catalog, public, pg_temp" in settings
        assert not for_everyone


def test_roles_of_the_version_before_may_go_on(
    empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were granted tables; processes of both versions run on, before anybody grants more."""
    known = migrations.known_migrations()
    writer, reader = (f"r_{uuid.uuid4().hex[:8]}" for _ in range(2))
    with monkeypatch.context() as before:
        before.setattr(migrations, "known_migrations", lambda: known[:5])
        migrate(empty_database)
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {writer}; CREATE ROLE {reader}".encode())
        connection.execute(f"GRANT SELECT ON payment_events TO {reader}".encode())
        connection.execute(f"GRANT SELECT, INSERT ON payment_events TO {writer}".encode())
        connection.execute(f"GRANT UPDATE ON unsettled_payments TO {writer}".encode())
        migrate(empty_database)
        found = connection.execute(
            "SELECT role,"
            "  (SELECT array_agg(has_function_privilege(role, oid, 'EXECUTE')) FROM pg_proc"
            "    WHERE proname IN ('append_payment_events', 'add_log_seals')),"
            "  has_table_privilege(role, 'log_losses', 'INSERT'),"
            "  has_table_privilege(role, 'log_losses', 'SELECT'),"
            "  has_table_privilege(role, 'log_identity', 'SELECT'),"
            "  has_table_privilege(role, 'refund_sendings', 'SELECT, INSERT, UPDATE, DELETE'),"
            "  has_table_privilege(role, 'provider_references', 'SELECT'),"
            "  has_table_privilege(role, 'provider_references', 'INSERT, UPDATE, DELETE'),"
            "  has_table_privilege(role, 'provider_hints', 'SELECT'),"
            "  has_table_privilege(role, 'provider_hints', 'INSERT, DELETE')"
            "  FROM unnest(%s::text[]) AS roles (role)",
            [[writer, reader]],
        ).fetchall()
        connection.execute(f"DROP OWNED BY {writer}, {reader}".encode())
        connection.execute(f"DROP ROLE {writer}, {reader}".encode())
    assert found == [
        (writer, [True] * 3, True, True, True, True, True, False, True, True),
        (reader, [False] * 3, False, True, True, False, True, False, True, False),
    ]


@pytest.mark.parametrize("again", ["repeated", "conflict"])
def test_what_is_answered_from_the_log_waits_for_the_standby_too(
    state_dir: Path, again: str
) -> None:
    """An event may stand there that the standby never confirmed: the server crashed between.

    Postgres waits for a synchronous standby only if a transaction wrote something; there is none
    here, so a commit that waits does not return.
    """
    facts = History("k").facts
    events = [[to_stored_event(facts[0])], [to_stored_event(History("k").facts[0])]]
    event = events[0 if again == "repeated" else 1]
    with OutsidePostgres(state_dir / f"standby-{again}") as server, server.connect() as connection:
        migrate(server.address)
        connection.execute("SET statement_timeout = 0")
        append(connection, facts)
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        with server.connect() as waiting:
            waiting.execute("SET synchronous_commit = on")
            assert waiting.execute("SHOW synchronous_standby_names").fetchone() == ("nobody",)
            with pytest.raises(psycopg.OperationalError):
                _answered_within(waiting, event, seconds=1.0)
        connection.execute("SET synchronous_commit = local")
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")
        assert outcome_of(connection, event) == again


def outcome_of(connection: Connection, event: list[StoredEvent]) -> str:
    ((outcome, _, _),) = connection.execute(APPEND, append_params([event])).fetchall()
    return str(outcome)


def _answered_within(connection: Connection, event: list[StoredEvent], seconds: float) -> None:
    """Ends the connection's process if it does not answer; then this raises OperationalError."""
    backend = psutil.Process(connection.info.backend_pid)
    timer = threading.Timer(seconds, backend.terminate)
    timer.start()
    try:
        outcome_of(connection, event)
    finally:
        timer.cancel()
