"""What Postgres plans for a statement, and does."""

from collections.abc import Iterator
from typing import Any

import psycopg


class Plan:
    """What EXPLAIN ANALYZE says of a statement."""

    def __init__(self, connection: psycopg.Connection[Any], query: str, params: Any) -> None:
        explain = "EXPLAIN (ANALYZE, FORMAT JSON) " + query
        row = connection.execute(explain.encode(), params, prepare=False, binary=False).fetchone()
        assert row is not None
        self.nodes = list(_nodes(row[0][0]["Plan"]))
        self.indexes = {node["Index Name"] for node in self.nodes if "Index Name" in node}

    @property
    def scanned(self) -> set[str]:
        """Tables that are read from one end to the other."""
        return {node["Relation Name"] for node in self.nodes if node["Node Type"] == "Seq Scan"}

    @property
    def looked_at(self) -> int:
        """Rows that scans returned or passed over."""
        return sum(
            round(
                (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            )
            for node in self.nodes
            if "Scan" in node["Node Type"]
        )


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
