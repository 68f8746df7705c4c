"""Checks and restores the shape that 0002_read_models.sql gave the table payments.

The table is documented, so other software may treat it as its own: an ORM with schema
synchronization drops and adds columns, and drops constraints and indexes that it does not know.

Only the original shape is compared; additions stay. Names do not matter, except of restored
indexes. Rows are not checked: `payments rebuild` writes those that differ from the log.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
from psycopg.sql import SQL, Composed, Identifier

LOCK_WAIT = "5s"


class Column(NamedTuple):
    """`kind` and `default` as Postgres prints them; `default` "" if there is none."""

    name: str
    kind: str
    default: str = ""


COLUMNS = (
    Column("id", "uuid", "gen_random_uuid()"),
    Column("merchant_order_id", "uuid"),
    Column("idempotency_key", "text"),
    Column("amount_cents", "integer", "0"),
    Column("currency", "text", "'INR'::text"),
    Column("status", "text"),
    Column("provider_txn_id", "text"),
    Column("created_at", "timestamp without time zone", "now()"),
    Column("updated_at", "timestamp without time zone", "now()"),
)
PRIMARY_KEY, UNIQUE_KEY = "PRIMARY KEY (id)", "UNIQUE (idempotency_key)"
KNOWN_STATUS = (
    "CHECK ((status = ANY (ARRAY['PENDING'::text, 'SUCCESS'::text, 'FAILED'::text,"
    " 'REFUNDED'::text])))"
)
INDEXES = {
    "payments_newest": "btree (created_at DESC, id DESC)",
    "payments_of_order": "btree (merchant_order_id, created_at DESC, id DESC)",
    "payments_by_status": "btree (status, created_at DESC, id DESC)",
    "payments_by_currency": "btree (currency, created_at DESC, id DESC)",
}

# (what, name, definition) of all columns, constraints and indexes.
FIND = """
WITH payments AS (SELECT to_regclass('payments') AS id)
SELECT 'column', a.attname::text,
       concat_ws(', ', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid),
                 CASE WHEN a.attnotnull AND a.attname <> 'id' THEN 'NOT NULL' END)
  FROM payments p JOIN pg_attribute a ON a.attrelid = p.id
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attnum > 0 AND NOT a.attisdropped
 UNION ALL
SELECT 'constraint', k.conname::text, pg_get_constraintdef(k.oid)
  FROM payments p JOIN pg_constraint k ON k.conrelid = p.id
 WHERE k.contype IN ('c', 'p', 'u')
 UNION ALL
SELECT 'index', c.relname::text, split_part(pg_get_indexdef(i.indexrelid), ' USING ', 2)
  FROM payments p JOIN pg_index i ON i.indrelid = p.id JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indisvalid
"""

# Values that a restored constraint would reject; the log has the right ones.
GIVE_UP_STATUSES = """
UPDATE payments SET status = NULL
 WHERE status NOT IN ('PENDING', 'SUCCESS', 'FAILED', 'REFUNDED')
"""
GIVE_UP_KEYS = """
UPDATE payments p SET idempotency_key = NULL
 WHERE EXISTS (SELECT FROM payments o
                WHERE o.idempotency_key = p.idempotency_key AND o.ctid <> p.ctid)
"""
GIVE_UP_IDS = """
DELETE FROM payments p
 WHERE id IS NULL OR EXISTS (SELECT FROM payments o WHERE o.id = p.id AND o.ctid < p.ctid)
"""


class Shape(NamedTuple):
    """The columns, constraints and indexes of the table."""

    columns: dict[str, str]
    constraints: set[str]
    indexes: set[str]


def lost(connection: psycopg.Connection[Any]) -> list[str]:
    """The missing or changed parts, in words; one query of the catalogs."""
    shape = _shape(connection)
    changed = [f"column {each.name}" for each in COLUMNS if not _stands(each, shape)]
    for definition, name in (
        (PRIMARY_KEY, "primary key"),
        (UNIQUE_KEY, "unique idempotency_key"),
        (KNOWN_STATUS, "check of status"),
    ):
        changed += [name] if definition not in shape.constraints else []
    changed += [f"index {name}" for name, parts in INDEXES.items() if parts not in shape.indexes]
    return changed


def restore(connection: psycopg.Connection[Any]) -> None:
    """Restores the shape in one transaction, with a short lock timeout; raises psycopg.Error."""
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'")
        connection.execute("CREATE TABLE IF NOT EXISTS payments ()")
        connection.execute("LOCK TABLE payments IN ACCESS EXCLUSIVE MODE")
        shape = _shape(connection)
        for column in COLUMNS:
            if not _stands(column, shape):
                _restore_column(connection, column, column.name in shape.columns)
        for statement in _constraints(_shape(connection)):
            connection.execute(statement.encode())
        standing = _shape(connection).indexes
        for name, parts in INDEXES.items():
            if parts not in standing:
                index = Identifier(name)
                connection.execute(SQL("DROP INDEX IF EXISTS {}").format(index))
                made = SQL("CREATE INDEX {} ON payments USING {}")
                connection.execute(made.format(index, SQL(parts)))


def _shape(connection: psycopg.Connection[Any]) -> Shape:
    shape = Shape(columns={}, constraints=set(), indexes=set())
    for what, name, definition in connection.execute(FIND).fetchall():
        if what == "column":
            shape.columns[name] = definition
        else:
            (shape.constraints if what == "constraint" else shape.indexes).add(definition)
    return shape


def _stands(column: Column, shape: Shape) -> bool:
    definition = ", ".join(part for part in (column.kind, column.default) if part)
    return shape.columns.get(column.name) == definition


def _restore_column(connection: psycopg.Connection[Any], column: Column, is_there: bool) -> None:
    def alter(change: str) -> Composed:
        return SQL("ALTER TABLE payments " + change).format(
            name=Identifier(column.name),
            kind=SQL(column.kind),
            default=SQL(column.default),
        )

    if not is_there:
        connection.execute(alter("ADD COLUMN {name} {kind}"))
    else:
        connection.execute(alter("ALTER COLUMN {name} DROP DEFAULT"))
        if column.name != "id":
            connection.execute(alter("ALTER COLUMN {name} DROP NOT NULL"))
        kind = "ALTER COLUMN {name} TYPE {kind} USING "
        try:
            with connection.transaction():
                connection.execute(alter(kind + "{name}::text::{kind}"))
        except psycopg.DataError:
            connection.execute(alter(kind + "NULL"))
    if column.default:
        connection.execute(alter("ALTER COLUMN {name} SET DEFAULT {default}"))


def _constraints(shape: Shape) -> Iterator[str]:
    """The statements that restore missing constraints, after clearing conflicting values."""
    if PRIMARY_KEY not in shape.constraints:
        yield GIVE_UP_IDS
        yield f"ALTER TABLE payments ADD {PRIMARY_KEY}"
    if UNIQUE_KEY not in shape.constraints:
        yield GIVE_UP_KEYS
        yield f"ALTER TABLE payments ADD {UNIQUE_KEY}"
    if KNOWN_STATUS not in shape.constraints:
        yield GIVE_UP_STATUSES
        yield f"ALTER TABLE payments ADD {KNOWN_STATUS}"
