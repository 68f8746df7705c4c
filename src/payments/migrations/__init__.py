"""Numbered SQL files and the runner that applies them, each in its own transaction.

An applied file must not change: its checksum is recorded, and a difference stops the start. To
change the schema, add the next number.

A version of the service must be able to run on a schema that a newer one has migrated: beside it in
a rolling update, and instead of it after a rollback. So the first line of a file names the oldest
version that can, by the newest migration which that version knows: `-- oldest: 0005`. `oldest` is
also recorded with each migration, for versions that do not have the file.

The first release refuses unknown rows in `schema_migrations`. So only its own migrations, up to
0005, are recorded there; later ones are in `schema_versions`, which it does not read.

A file that begins, after its comments, with CREATE INDEX CONCURRENTLY contains only that statement
and runs outside a transaction. The next run removes the rest of a killed one.

shape.py restores the documented table `payments`; legacy.py detects that of the Node service.

docs/decisions/upgrades.md has the rules for files, with reasons.
"""

import hashlib
import re
import time
from importlib import resources
from typing import Any, NamedTuple

import msgspec
import psycopg
from loguru import logger
from psycopg.sql import SQL, Identifier

from payments.database.connections import DatabaseAddress, again_on_conflict, connect, reason_of
from payments.errors import StartError
from payments.migrations import shape
from payments.migrations.legacy import IMPORT_OPEN, NOT_OURS, LegacyTable, legacy_table, tables_here

LOCK_KEYS = (7165010, 2)  # 1 was the lock of the appends, until 0012_append_alone.sql
LOCK_WAIT_S = 120  # another process may be running a long migration
LOCK_POLL_S = 0.1
PAYMENTS_MADE_BY = 2  # the migration that creates our table payments
FIRST_RELEASE = 5  # the newest migration of the version that knows only schema_migrations

TABLES = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number     integer     PRIMARY KEY,
    name       text        NOT NULL,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

DO $$
DECLARE
    grantee text;
BEGIN
    IF to_regclass('schema_versions') IS NOT NULL THEN
        RETURN;
    END IF;
    -- One row per migration from 0006 on. `oldest`: who knows the migrations up to this one, and
    -- none that is later, may run on the schema from this migration on.
    CREATE TABLE schema_versions (
        number     integer     PRIMARY KEY CHECK (number > 5),
        name       text        NOT NULL,
        checksum   text        NOT NULL,
        oldest     integer     NOT NULL CHECK (oldest <= number),
        applied_at timestamptz NOT NULL DEFAULT now()
    );
    -- Whoever may look whether the database is up to date goes on to.
    FOR grantee IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a
          LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'schema_migrations'::regclass AND a.privilege_type = 'SELECT'
    LOOP
        EXECUTE format('GRANT SELECT ON schema_versions TO %s', grantee);
    END LOOP;
END $$
"""

APPLIED_UP_TO_0005 = "SELECT number, name, checksum, number FROM schema_migrations"
APPLIED_LATER = "SELECT number, name, checksum, oldest FROM schema_versions"

RECORD_UP_TO_0005 = "INSERT INTO schema_migrations (number, name, checksum) VALUES (%s, %s, %s)"
RECORD_LATER = """
INSERT INTO schema_versions (number, name, checksum, oldest) VALUES (%s, %s, %s, %s)
"""

IS_INVALID = "SELECT FROM pg_index WHERE indexrelid = to_regclass(%s) AND NOT indisvalid"

# Comments, then the statement. IF NOT EXISTS: the index may exist without its record.
_INDEX = re.compile(
    r"(?:\s|--.*\n)*CREATE(?: UNIQUE)? INDEX CONCURRENTLY IF NOT EXISTS ([a-z0-9_]+)\s"
)


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    name: str
    sql: str

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def statements(self) -> bytes:
        """The SQL as sent, in ASCII: a database in another encoding than UTF-8 (LATIN1, SQL_ASCII)
        refuses characters that it cannot store. Only comments have any."""
        return self.sql.encode("ascii", "replace")

    @property
    def oldest(self) -> int:
        """The oldest version that may run on the schema, as the newest migration that it knows."""
        stated = re.match(r"-- oldest: ([0-9]{4})\n", self.sql)
        return int(stated[1]) if stated else self.number

    @property
    def index(self) -> str | None:
        """The index of its CREATE INDEX CONCURRENTLY, None if it is another migration."""
        found = _INDEX.match(self.sql)
        return found[1] if found else None


class Applied(NamedTuple):
    """A migration as recorded in the database."""

    number: int
    name: str
    checksum: str
    oldest: int

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


class Schema(NamedTuple):
    """The differences between a database's schema and this version of the software.

    `missing` is not applied yet, `newer` is unknown to this version; both in order.
    """

    missing: list[Migration]
    newer: list[Applied]
    refusal: str | None  # why this version must not run on it, and the fix


def known_migrations() -> list[Migration]:
    """The migrations of this version of the software, in order."""
    found = [
        Migration(number=int(match[1]), name=match[2], sql=entry.read_text(encoding="utf-8"))
        for entry in resources.files(__name__).iterdir()
        if (match := re.fullmatch(r"([0-9]{4})_([a-z0-9_]+)\.sql", entry.name))
    ]
    return sorted(found, key=lambda migration: migration.number)


def migrate(address: DatabaseAddress, *, importing: bool = False) -> list[Migration]:
    """Brings the schema up to date; returns the applied migrations.

    Any number of processes may call this concurrently: one applies, the others wait. Raises
    StartError if a newer version has migrated the database to a schema that this one cannot run on,
    if an applied file was changed, if another service's table payments exists, or, unless
    `importing`, if the import of its payments is not complete.
    """
    with connect(address, "payments migrate") as connection:
        # A migration may take longer than a request.
        connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        try:
            schema = schema_of(connection, importing=importing)
            if not schema.missing:
                # Without the lock, which any session can hold: a start must not wait needlessly.
                _refuse(schema)
                _restore_shape(connection)
                return []
            _lock(connection)
            connection.execute(TABLES)
            schema = schema_of(connection, importing=importing)
            _refuse(schema)
            for migration in schema.missing:
                _apply(connection, migration)
            _restore_shape(connection)
        except psycopg.Error as error:
            raise StartError(f"migration failed: {reason_of(error)}") from error
    return schema.missing


def check_migrated(address: DatabaseAddress) -> None:
    """Raises StartError unless all known migrations are applied and this version may run on newer
    ones."""
    with connect(address, "payments migrate") as connection:
        schema = schema_of(connection)
        _refuse(schema)
        _demand(schema)
        _tell_of_shape(connection)


def check_readable(address: DatabaseAddress) -> None:
    """Raises StartError unless all known migrations are applied. Reading is allowed with newer
    ones: at worst a query fails.
    """

    def read() -> Schema:
        with connect(address, "payments migrate") as connection:
            schema = schema_of(connection)
            _demand(schema)
            _tell_of_shape(connection)
            return schema

    schema = again_on_conflict(read)
    if schema.newer:
        logger.bind(migration=str(schema.newer[-1])).warning(
            "the database is newer than this version, and may not be compatible with it"
        )


def restore_shape(address: DatabaseAddress) -> None:
    """Restores the shape of the table payments if other software changed it; raises
    psycopg.Error."""
    with connect(address, "payments migrate") as connection:
        connection.execute("SET statement_timeout = 0")
        if shape.lost(connection):
            _lock(connection)
            shape.restore(connection)


def _tell_of_shape(connection: psycopg.Connection[Any]) -> None:
    if changed := shape.lost(connection):
        logger.bind(changed=", ".join(changed)).warning(
            "other software changed the table payments: `payments migrate`, then `payments rebuild`"
        )


def _restore_shape(connection: psycopg.Connection[Any]) -> None:
    """Logs a failure instead of raising it: payments must work even if a read model's table is
    wrong."""
    if not (changed := shape.lost(connection)):
        return
    log = logger.bind(changed=", ".join(changed))
    _lock(connection)
    try:
        shape.restore(connection)
    except psycopg.Error as error:
        log.bind(reason=reason_of(error)).warning(
            "other software changed the table payments, and its shape cannot be restored"
        )
    else:
        log.warning(
            "other software changed the table payments; its shape is restored: `payments rebuild` "
            "restores its rows"
        )


def schema_of(connection: psycopg.Connection[Any], *, importing: bool = False) -> Schema:
    """Only reads. Raises StartError if a file was changed after it was applied, or if the table
    payments is another service's. `importing`: accepts an incomplete import."""
    tables = tables_here(connection)
    known, applied = known_migrations(), _applied(connection)
    legacy = legacy_table(connection, tables, PAYMENTS_MADE_BY in applied)
    if legacy is LegacyTable.IN_PLACE:
        raise StartError(NOT_OURS)
    newer = [applied[number] for number in sorted(applied.keys() - {m.number for m in known})]
    for migration in known:
        record = applied.get(migration.number)
        if record is not None and record.checksum != migration.checksum:
            raise StartError(
                f"migration {migration} was changed after it was applied to this database: "
                "restore the file and add a new migration"
            )
    oldest = max((record.oldest for record in newer), default=0)
    refusal = IMPORT_OPEN if legacy is LegacyTable.OPEN and not importing else None
    if oldest > known[-1].number:
        refusal = (
            f"the database has migration {newer[-1]}, which this version does not know: "
            f"run a version of the service that knows migration {oldest:04}"
        )
    missing = [migration for migration in known if migration.number not in applied]
    return Schema(missing, newer, refusal)


def legacy_of(connection: psycopg.Connection[Any]) -> LegacyTable:
    """The state of the import of the Node service's payments. Only reads."""
    tables = tables_here(connection)
    return legacy_table(connection, tables, PAYMENTS_MADE_BY in _applied(connection))


def _applied(connection: psycopg.Connection[Any]) -> dict[int, Applied]:
    rows: list[Applied] = []
    for table, query in (
        ("schema_migrations", APPLIED_UP_TO_0005),
        ("schema_versions", APPLIED_LATER),
    ):
        if _one(connection, "SELECT to_regclass(%s) IS NOT NULL", (table,)):
            rows += (Applied(*row) for row in connection.execute(query))
    return {record.number: record for record in rows}


def _refuse(schema: Schema) -> None:
    if schema.refusal is not None:
        raise StartError(schema.refusal)
    if schema.newer:
        logger.bind(migration=str(schema.newer[-1])).warning(
            "the database is newer than this version, but compatible with it"
        )


def _demand(schema: Schema) -> None:
    if schema.missing:
        names = ", ".join(str(migration) for migration in schema.missing)
        raise StartError(f"the database lacks {names}: run `payments migrate` first")


def _lock(connection: psycopg.Connection[Any]) -> None:
    """Takes the lock of migrations.

    Polls: waiting inside pg_advisory_lock would hold a snapshot, for which a CREATE INDEX
    CONCURRENTLY of the process with the lock would wait: a deadlock.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while not _one(connection, "SELECT pg_try_advisory_lock(%s, %s)", LOCK_KEYS):
        if time.monotonic() > deadline:
            raise StartError("another process has been migrating the database for 2 minutes")
        time.sleep(LOCK_POLL_S)


def _apply(connection: psycopg.Connection[Any], migration: Migration) -> None:
    """Applies and records it in one transaction, or, for an index, so that it can be repeated."""
    log = logger.bind(migration=str(migration))
    if migration.index is not None:
        # It waits for all open transactions, even a long audit's, but blocks no others.
        log.info("building an index, once all open transactions have ended")
        _drop_if_invalid(connection, migration.index)
        connection.execute(migration.statements)
        _record(connection, migration)
    else:
        with connection.transaction():
            # Requests queue behind a session that waits for a table lock.
            connection.execute("SET LOCAL lock_timeout = '60s'")
            connection.execute(migration.statements)
            _record(connection, migration)
    log.info("migration applied")


def _drop_if_invalid(connection: psycopg.Connection[Any], index: str) -> None:
    """Drops the invalid index of a killed build: writes update it, no query uses it, and IF NOT
    EXISTS would skip the build."""
    if connection.execute(IS_INVALID, [index]).rowcount:
        connection.execute(SQL("DROP INDEX CONCURRENTLY {}").format(Identifier(index)))


def _record(connection: psycopg.Connection[Any], migration: Migration) -> None:
    row = [migration.number, migration.name, migration.checksum]
    if migration.number <= FIRST_RELEASE:
        connection.execute(RECORD_UP_TO_0005, row)
    else:
        connection.execute(RECORD_LATER, [*row, migration.oldest])


def _one(connection: psycopg.Connection[Any], query: str, params: tuple[int | str, ...]) -> Any:
    row = connection.execute(query.encode(), params).fetchone()
    return row[0] if row else None
