"""Whether the simulated provider's ledger is the one that this database's payments are in. The
table simulated_ledger, and all of its SQL."""

from pathlib import Path
from uuid import UUID

from payments.database.connections import Database
from payments.errors import StartError

KNOWN = """
SELECT id FROM simulated_ledger
"""

MAKE_KNOWN = """
INSERT INTO simulated_ledger (id) VALUES (%(id)s) ON CONFLICT DO NOTHING RETURNING id
"""

FORGET = "DELETE FROM simulated_ledger"


async def check_ledger(database: Database, path: Path, id: UUID) -> None:
    """The first ledger becomes the known one. Raises StartError, DatabaseUnavailable."""
    known = await database.fetch(KNOWN)
    if not known:
        made = await database.fetch(MAKE_KNOWN, {"id": id})
        known = made or await database.fetch(KNOWN)
    if known != [(id,)]:
        raise StartError(
            f"SIMULATED_LEDGER: {str(path)!r} is not the ledger of this database: all "
            "processes need the same file, on a shared volume; if that file is lost, "
            f"`payments psql -c '{FORGET}'` accepts the next: docs/simulated-gateway.md"
        )
