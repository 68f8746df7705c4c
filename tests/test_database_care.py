"""What docs/security.md and docs/backup.md promise: roles, and a restore."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments import embedded_postgres
from payments.database.connections import DatabaseAddress
from tests.invariants.checker import check
from tests.process import ROOT, ServiceProcess, at, beside_progress, invoke, open_directory, run
from tests.support import ORDER_ID, ledger_rows

Connection = psycopg.Connection[Any]
ROLES = ("payments_owner", "payments_service", "payments_auditor")


@pytest.fixture
def roles(empty_database: DatabaseAddress) -> Iterator[dict[str, DatabaseAddress]]:
    """The roles of the page, made by its own statements, and the schema by its own command."""
    page = (ROOT / "docs/security.md").read_text()
    create, grant = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    mark = uuid.uuid4().hex[:8]  # roles are the whole server's

    def ours(statements: str) -> bytes:
        named = re.sub(r"payments_(owner|service|auditor)", rf"payments_\1_{mark}", statements)
        return named.replace("paymentdb", empty_database.dbname).encode()

    addresses = {
        role: msgspec.structs.replace(empty_database, user=f"{role}_{mark}") for role in ROLES
    }
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute(ours(create))
        owner = addresses["payments_owner"]
        done = invoke("migrate", **at(owner))
        assert done.returncode == 0, done.stderr
        with psycopg.connect(owner.conninfo("tests"), autocommit=True) as as_owner:
            as_owner.execute(ours(grant))
        yield addresses
        for address in addresses.values():
            connection.execute(f"REASSIGN OWNED BY {address.user} TO postgres".encode())
            connection.execute(f"DROP OWNED BY {address.user}".encode())
            connection.execute(f"DROP ROLE {address.user}".encode())


def test_the_service_works_under_its_role_and_cannot_alter_events(
    roles: dict[str, DatabaseAddress], tmp_path: Any
) -> None:
    service = roles["payments_service"]
    given = {**at(service), "MIGRATE_ON_START": "false", "LOG_LEVEL": "WARNING"}
    callbacks = {"ORDER_CALLBACK_URL": "http://127.0.0.1:9/nobody"}
    with (
        ServiceProcess(tmp_path, **given, **callbacks) as running,
        httpx.Client(base_url=running.url, timeout=10) as client,
    ):
        paid = running.charge(client, "k1").json()
        running.charge(client, "k2")
        assert client.post("/v1/refund", json={"payment_id": paid["id"]}).status_code == 201
        assert client.get(f"/v1/payments/{paid['id']}").json()["status"] == "REFUNDED"
        with psycopg.connect(service.conninfo("tests"), autocommit=True) as connection:
            caught_up = "SELECT min(position) = (SELECT max(notification_id) FROM payment_events)"
            for _ in range(200):
                row = connection.execute(f"{caught_up} FROM followers".encode()).fetchone()
                if row == (True,):
                    break
                connection.execute("SELECT pg_sleep(0.05)")
            else:
                pytest.fail("a follower does not work under this role")
            for statement in (
                "UPDATE payment_events SET state = ''",
                "DELETE FROM payment_events",
                "TRUNCATE payment_events",
                "ALTER TABLE payment_events DISABLE TRIGGER ALL",
                "DROP TABLE payment_events",
                "UPDATE log_seals SET hash = sha256('')",
                "DELETE FROM log_seals",
                "INSERT INTO payment_events"
                " VALUES (99, gen_random_uuid(), 1, 'PaymentCharged', '', now())",
                "INSERT INTO log_seals VALUES (99, sha256(''))",
                "DELETE FROM log_losses",
                "UPDATE log_identity SET id = gen_random_uuid()",
                "CREATE OR REPLACE FUNCTION add_log_seals(positions bigint[], hashes bytea[])"
                " RETURNS void LANGUAGE sql AS ''",
                "SET session_replication_role = replica",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.encode())
            assert connection.execute("SELECT count(*) FROM callback_attempts").fetchone()
        log = running.log.read_text()
        assert running.terminate() == 0
    assert "permission denied" not in log
    done = invoke("rebuild", **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "only the append function may write to the log" in invoke("doctor", **given).stdout


def test_an_auditor_reads_and_writes_nothing(
    roles: dict[str, DatabaseAddress], empty_database: DatabaseAddress, tmp_path: Any
) -> None:
    given = {**at(roles["payments_service"]), "MIGRATE_ON_START": "false"}
    with ServiceProcess(tmp_path, **given) as running, httpx.Client(timeout=10) as client:
        payment_id = running.charge(client, "k1").json()["id"]
    auditor = {**at(roles["payments_auditor"]), "LOG_LEVEL": "WARNING"}
    for arguments in (
        ("replay",),
        ("replay", "--payment", payment_id, "--as-of", "1"),
        ("replay", "--order", str(ORDER_ID), "--format", "table"),
        ("explain", payment_id),
        ("audit", "verify"),
        ("rebuild", "--dry-run"),
    ):
        done = invoke(*arguments, **auditor)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute("UPDATE payments SET amount_cents = 1")
        refused = invoke("rebuild", **auditor)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert refused.stderr.startswith("payments: the database: permission denied")
        assert "this role may only read the log" in invoke("doctor", **auditor).stdout
        with psycopg.connect(
            roles["payments_auditor"].conninfo("tests"), autocommit=True
        ) as as_auditor:
            for function in (
                "append_payment_events('{}', '{}', '{}', '{}', '{}', '{}', '{}', now(), true)",
                "append_payment_events('{}', '{}', '{}', '{}', '{}', '{}')",
                "add_log_seals('{}', '{}')",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    as_auditor.execute(f"SELECT {function}".encode())
        connection.execute("REVOKE SELECT ON log_seals FROM PUBLIC")
        auditor_name = roles["payments_auditor"].user
        connection.execute(f"REVOKE SELECT ON log_seals FROM {auditor_name}".encode())
        unable = invoke("audit", "verify", **auditor)
        assert (unable.returncode, unable.stderr.count("\n")) == (2, 1)
        assert "permission denied for table log_seals" in unable.stderr


@pytest.fixture
def home() -> Iterator[Path]:
    with open_directory("payments-restored-") as opened:
        yield opened


def test_a_dump_is_restored_and_goes_on(home: Path) -> None:
    """As docs/backup.md says, with the service at work while it is dumped."""
    ledger = {"SIMULATED_LEDGER": home / "ledger.sqlite", "LOG_LEVEL": "WARNING"}
    before, after = home / "before", home / "after"
    dump, into = str(home / "payments.dump"), {"PAYMENTS_DATA_DIR": after}
    for directory in (before, after):
        directory.mkdir()
    with ServiceProcess(before, **ledger) as service, httpx.Client(timeout=10) as client:
        charged = [service.charge(client, f"k{n}").json() for n in range(20)]
        done = run("dump", dump, PAYMENTS_DATA_DIR=before)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        lost = service.charge(client, "lost").json()
    done = run("restore", dump, **into)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    verified = run("audit", "verify", **into)
    assert (verified.returncode, beside_progress(verified.stderr)) == (0, []), verified
    with (
        ServiceProcess(after, **ledger) as service,
        httpx.Client(base_url=service.url, timeout=10) as client,
    ):
        assert [service.charge(client, f"k{n}").json() for n in range(20)] == charged
        assert client.get(f"/v1/payments/{lost['id']}").status_code == 404
        # The provider knows it: the same capture, and not another one.
        assert service.charge(client, "lost").json() == lost
        assert service.charge(client, "new").status_code == 201
        with embedded_postgres.start(after) as running:
            socket = str(running.socket_dir)
            restored = DatabaseAddress(
                host=socket, port=running.port, user=running.user, password=None, dbname="paymentdb"
            )
            with psycopg.connect(restored.conninfo("tests"), autocommit=True) as connection:
                check(connection, caught_up=False)
    captured = [str(row.id) for row in ledger_rows(home / "ledger.sqlite")]
    assert captured.count(lost["id"]) == 1
    for directory in (before, after):
        embedded_postgres.wait_until_stopped(directory)
