"""The table of the Node service that used this database before, and the state of its import.

Its table is called payments too, so it is detected before any migration. The import
(commands/importing.py) renames it and adds a comment, which marks it from then on; renaming it back
is the way back to the Node service.
"""

from enum import Enum, auto
from typing import Any

import psycopg

MARK = "Payments of the Node service: docs/migrating-from-node.md"

NOT_OURS = (
    "the table payments in this database is that of the Node service: stop that service and run "
    "`payments import-legacy` (docs/migrating-from-node.md); nothing was changed"
)
IMPORT_OPEN = (
    "the payments of the Node service are not all imported: run `payments import-legacy` again"
)

TABLES = """
SELECT c.relname::text, obj_description(c.oid, 'pg_class') IS NOT DISTINCT FROM %s
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = current_schema() AND c.relname IN ('payments', 'legacy_payments')
"""

HAS_IMPORT = "SELECT to_regclass('legacy_import') IS NOT NULL"
IS_COMPLETE = "SELECT FROM legacy_import WHERE completed_at IS NOT NULL"

# Its constraints and indexes have the same names as ours. If the Node service used the database
# again for a while, our table was renamed for it, and the rows that it wrote are imported too.
SET_ASIDE = """
ALTER TABLE payments RENAME TO legacy_payments;
COMMENT ON TABLE legacy_payments IS 'Payments of the Node service: docs/migrating-from-node.md';
ALTER TABLE IF EXISTS rolled_back_payments RENAME TO payments;
DO $$
DECLARE
    name text;
BEGIN
    IF to_regclass('legacy_import') IS NOT NULL THEN
        UPDATE legacy_import SET completed_at = NULL;
    END IF;
    FOR name IN
        SELECT conname FROM pg_constraint
         WHERE conrelid = 'legacy_payments'::regclass AND conname LIKE 'payments%'
    LOOP
        EXECUTE format('ALTER TABLE legacy_payments RENAME CONSTRAINT %I TO %I',
                       name, left('legacy_' || name, 63));
    END LOOP;
    FOR name IN
        SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
         WHERE i.indrelid = 'legacy_payments'::regclass AND c.relname LIKE 'payments%'
    LOOP
        EXECUTE format('ALTER INDEX %I RENAME TO %I', name, left('legacy_' || name, 63));
    END LOOP;
END $$
"""


class LegacyTable(Enum):
    """The state of the Node service's table: absent, in place of ours, or set aside, with an import
    that is incomplete or complete."""

    NONE = auto()
    IN_PLACE = auto()
    OPEN = auto()
    COMPLETE = auto()


def tables_here(connection: psycopg.Connection[Any]) -> dict[str, bool]:
    """Which of the tables payments and legacy_payments exist, and whether each is marked."""
    return dict(connection.execute(TABLES, [MARK]).fetchall())


def legacy_table(
    connection: psycopg.Connection[Any], marked: dict[str, bool], ours_is_made: bool
) -> LegacyTable:
    """`ours_is_made`: whether the migration that creates our table is recorded. `marked`, from
    `tables_here`, must be read before it, since another process may apply that migration at any
    time. Only reads."""
    if "payments" in marked and (marked["payments"] or not ours_is_made):
        return LegacyTable.IN_PLACE
    if not marked.get("legacy_payments"):
        return LegacyTable.NONE
    if connection.execute(HAS_IMPORT).fetchone() != (True,):
        return LegacyTable.OPEN
    return LegacyTable.COMPLETE if connection.execute(IS_COMPLETE).rowcount else LegacyTable.OPEN
