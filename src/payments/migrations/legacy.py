"""The table of the Node service that had this database before, and how far its import came.

Its table is called payments as well, so it is looked for before anything is migrated. The import
(commands/importing.py) gives it another name and a comment, by which it is known from then on; to
go back to the Node service is to give it its name again.
"""

from enum import Enum, auto
from typing import Any

import psycopg

MARK = "Payments of the Node service: docs/migrating-from-node.md"

NOT_OURS = (
    "the table payments in this database is that of the Node service: stop that one and run "
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

# The names of its constraints and indexes are ours as well. Where the Node service had the database
# back for a while, our table was given another name for it, and what it wrote is imported, too.
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
    """Where the Node service's table is: nowhere, at our table's place, or set aside, with an
    import that is still open or complete."""

    NONE = auto()
    IN_PLACE = auto()
    OPEN = auto()
    COMPLETE = auto()


def tables_here(connection: psycopg.Connection[Any]) -> dict[str, bool]:
    """Which of the tables payments and legacy_payments there are, and whether each has the mark."""
    return dict(connection.execute(TABLES, [MARK]).fetchall())


def legacy_table(
    connection: psycopg.Connection[Any], marked: dict[str, bool], ours_is_made: bool
) -> LegacyTable:
    """`marked` is what `tables_here` read before `ours_is_made` was: whether the migration that
    makes our table is on record. Another process may apply it at any time. Only reads."""
    if "payments" in marked and (marked["payments"] or not ours_is_made):
        return LegacyTable.IN_PLACE
    if not marked.get("legacy_payments"):
        return LegacyTable.NONE
    if connection.execute(HAS_IMPORT).fetchone() != (True,):
        return LegacyTable.OPEN
    return LegacyTable.COMPLETE if connection.execute(IS_COMPLETE).rowcount else LegacyTable.OPEN
