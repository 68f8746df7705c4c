"""Checks the triggers and constraints that protect the log, and the functions that read it.

A superuser can disable triggers, drop constraints, and restore both. While they are disabled, this
check reports it; the seals reveal what was altered meanwhile.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from payments.migrations import known_migrations
from payments.snapshot import Source


class Trigger(NamedTuple):
    """A trigger that refuses UPDATE, DELETE and TRUNCATE in every session."""

    table: str
    name: str
    function: str


class Constraint(NamedTuple):
    table: str
    name: str
    columns: frozenset[str]


class Broken(NamedTuple):
    """A guard that differs from the migrations."""

    guard: str
    text: str

    def __str__(self) -> str:
        return f"guard: {self.guard} {self.text}"


TRIGGERS = (
    Trigger(
        table="payment_events",
        name="payment_events_append_only",
        function="refuse_change_of_payment_events",
    ),
    Trigger(table="log_seals", name="log_seals_append_only", function="refuse_change_of_log_seals"),
    Trigger(
        table="log_losses", name="log_losses_append_only", function="refuse_change_of_log_losses"
    ),
    Trigger(
        table="log_identity",
        name="log_identity_append_only",
        function="refuse_change_of_log_losses",
    ),
)
CONSTRAINTS = (
    Constraint(
        table="payment_events",
        name="payment_events_stream",
        columns=frozenset({"originator_id", "originator_version"}),
    ),
    Constraint(
        table="payment_events",
        name="payment_events_position",
        columns=frozenset({"notification_id"}),
    ),
    # It need not be validated for the rows from before: see 0007.
    Constraint(
        table="payment_events",
        name="payment_events_sane",
        columns=frozenset({"notification_id", "originator_version", "recorded_at"}),
    ),
    Constraint(table="log_seals", name="log_seals_pkey", columns=frozenset({"position"})),
)
NEVER_NULL = (
    *("notification_id", "originator_id", "originator_version", "topic", "state", "recorded_at"),
)
# The functions that the audit reads with: with another body they could hide changes.
FUNCTIONS = (
    *("captured_transaction(bytea)", "initiated_gateway(bytea)"),
    *("readable_time(timestamptz)", "readable_time(timestamp)"),
)
TABLES = sorted({guard.table for guard in (*TRIGGERS, *CONSTRAINTS)})

# BEFORE, DELETE, UPDATE and TRUNCATE, per statement: catalog/pg_trigger.h.
REFUSES = 2 | 8 | 16 | 32

FIND_TRIGGERS = """
SELECT c.relname::text, t.tgname::text, t.tgenabled::text, t.tgtype::integer,
       t.tgqual IS NOT NULL OR t.tgattr::text <> '', p.proname::text, p.prosrc
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE c.oid IN (SELECT to_regclass(name) FROM unnest(%(tables)s::text[]) AS named (name))
"""

# Since Postgres 18, constraints can be NOT ENFORCED.
FIND_CONSTRAINTS = """
SELECT c.relname::text, k.conname::text,
       ARRAY(SELECT a.attname::text FROM pg_attribute a
              WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)),
       coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true)
       AND coalesce((SELECT i.indisunique AND i.indisvalid
                       FROM pg_index i WHERE i.indexrelid = k.conindid), true)
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
 WHERE c.oid IN (SELECT to_regclass(name) FROM unnest(%(tables)s::text[]) AS named (name))
"""

FIND_NULLABLE = """
SELECT attname::text FROM pg_attribute
 WHERE attrelid = to_regclass('payment_events') AND attname = ANY (%(columns)s::text[])
   AND NOT attnotnull
 ORDER BY attnum
"""

# The functions that these names resolve to. One with its own search_path could compute something
# else.
FIND_FUNCTIONS = """
SELECT named.signature, p.prosrc, l.lanname = 'sql' AND p.proconfig IS NULL
  FROM unnest(%(signatures)s::text[]) AS named (signature)
  LEFT JOIN pg_proc p ON p.oid = to_regprocedure(named.signature)
  LEFT JOIN pg_language l ON l.oid = p.prolang
"""

_FUNCTION = re.compile(
    r"CREATE (?:OR REPLACE )?FUNCTION (\w+)\(([^)]*)\) RETURNS .*?AS \$\$(.*?)\$\$", re.DOTALL
)


def broken_guards(source: Source) -> Iterator[Broken]:
    yield from _triggers(source)
    yield from _constraints(source)
    for (column,) in source.fetch(FIND_NULLABLE, {"columns": list(NEVER_NULL)}):
        yield Broken(f"the column {column} of payment_events", "takes NULL")
    yield from _functions(source)


def _triggers(source: Source) -> Iterator[Broken]:
    rows = source.fetch(FIND_TRIGGERS, {"tables": TABLES})
    found = {(table, name): rest for table, name, *rest in rows}
    bodies = _bodies()
    for trigger in TRIGGERS:
        guard = f"the trigger {trigger.name} on {trigger.table}"
        there = found.get((trigger.table, trigger.name))
        if there is None:
            yield Broken(guard, "is missing")
            continue
        state, kind, is_partial, function, body = there
        if state != "A":
            fires = "is disabled" if state == "D" else "does not fire in every session"
            yield Broken(guard, fires)
        if (kind, function, is_partial) != (REFUSES, trigger.function, False):
            yield Broken(guard, "is not the one that the migrations made")
        elif body != bodies.get(f"{function}()"):
            yield Broken(f"the function {function}", "is not the one that the migrations made")


def _constraints(source: Source) -> Iterator[Broken]:
    rows = source.fetch(FIND_CONSTRAINTS, {"tables": TABLES})
    found = {(table, name): (set(columns), holds) for table, name, columns, holds in rows}
    for constraint in CONSTRAINTS:
        guard = f"the constraint {constraint.name} on {constraint.table}"
        there = found.get((constraint.table, constraint.name))
        if there is None:
            yield Broken(guard, "is missing")
            continue
        columns, holds = there
        if not holds:
            yield Broken(guard, "is not enforced")
        elif columns != constraint.columns:
            yield Broken(guard, "is not the one that the migrations made")


def _functions(source: Source) -> Iterator[Broken]:
    bodies = _bodies()
    rows = source.fetch(FIND_FUNCTIONS, {"signatures": list(FUNCTIONS)})
    for signature, body, is_plain in rows:
        if body is None:
            yield Broken(f"the function {signature}", "is missing")
        elif not is_plain or body != bodies.get(signature):
            yield Broken(f"the function {signature}", "is not the one that the migrations made")


def _bodies() -> dict[str, str]:
    """The bodies of functions in their newest migration, by signature."""
    bodies = {}
    for migration in known_migrations():
        for name, arguments, body in _FUNCTION.findall(migration.sql):
            types = [argument.split()[-1] for argument in arguments.split(",") if argument]
            bodies[f"{name}({', '.join(types)})"] = body
    return bodies
