"""The Node service's table is recognised before anything is migrated, whoever would migrate."""

import pytest

from payments import migrations
from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.migrations import check_migrated, check_readable, known_migrations, migrate
from payments.migrations.legacy import IMPORT_OPEN, NOT_OURS, SET_ASIDE
from tests.legacy.conftest import Command, Node
from tests.legacy.node import insert
from tests.process import at, free_port, run

RELATIONS = """
SELECT c.relname::text, c.xmin::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = 'public' ORDER BY 1
"""


def begin_as_the_first_release(
    node: Node, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It committed 0001, and failed at 0002."""
    node.execute("ALTER TABLE payments RENAME TO away")
    known = known_migrations()
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "known_migrations", lambda: known[:1])
        patched.setattr(migrations.shape, "lost", lambda _: [])
        migrate(address)
    node.execute("ALTER TABLE away RENAME TO payments")


@pytest.mark.parametrize("attempted", [False, True])
def test_nothing_is_migrated(
    node: Node,
    payments: Command,
    empty_database: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
    attempted: bool,
) -> None:
    if attempted:
        begin_as_the_first_release(node, empty_database, monkeypatch)
    before = node.execute(RELATIONS).fetchall()
    for refused in (migrate, check_migrated, check_readable):
        with pytest.raises(StartError, match="payments import-legacy"):
            refused(empty_database)
    for command, code in ((("migrate",), 1), (("rebuild",), 1), (("audit", "verify"), 2)):
        done = payments(*command)
        assert (done.exit_code, done.stderr.count("\n")) == (code, 1)
        assert NOT_OURS in done.stderr
    assert NOT_OURS in payments("doctor").stdout
    assert node.execute(RELATIONS).fetchall() == before


def test_the_service_does_not_start(node: Node, empty_database: DatabaseAddress) -> None:
    done = run("serve", **at(empty_database), PORT=free_port(), LOG_LEVEL="WARNING")
    assert (done.returncode, done.stderr) == (1, f"payments: {NOT_OURS}\n")
    assert node.execute("SELECT to_regclass('schema_migrations')").fetchone() == (None,)


@pytest.mark.parametrize("migrated", [False, True])
def test_no_service_starts_while_rows_are_missing(
    node: Node, payments: Command, empty_database: DatabaseAddress, migrated: bool
) -> None:
    """The import was interrupted behind the first step, or behind the second."""
    insert(node)
    node.execute(SET_ASIDE.encode())
    if migrated:
        migrate(empty_database, importing=True)
        with pytest.raises(StartError) as caught:
            check_migrated(empty_database)
        assert str(caught.value) == IMPORT_OPEN
    with pytest.raises(StartError) as caught:
        migrate(empty_database)
    assert str(caught.value) == IMPORT_OPEN
    assert payments("import-legacy").exit_code == 0
    migrate(empty_database)
    check_migrated(empty_database)


def test_a_table_of_that_name_that_nobody_set_aside_is_no_matter(
    node: Node, empty_database: DatabaseAddress
) -> None:
    node.execute("ALTER TABLE payments RENAME TO legacy_payments")
    node.execute("ALTER INDEX payments_pkey RENAME TO legacy_pkey")
    node.execute("ALTER INDEX payments_idempotency_key_key RENAME TO legacy_key")
    migrate(empty_database)
    check_migrated(empty_database)


def test_there_must_be_something_to_import(
    payments: Command, empty_database: DatabaseAddress
) -> None:
    for _ in range(2):
        done = payments("import-legacy")
        assert done.exit_code == 2
        assert "no table payments of the Node service" in done.stderr
        migrate(empty_database)


def test_another_table_of_that_name_is_not_taken(node: Node, payments: Command) -> None:
    node.execute("ALTER TABLE payments DROP COLUMN currency, DROP COLUMN status")
    done = payments("import-legacy")
    assert done.exit_code == 2
    assert "payments lacks currency, status" in done.stderr
    assert node.execute("SELECT to_regclass('legacy_payments')").fetchone() == (None,)
