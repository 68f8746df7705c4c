"""Going back to the Node service, as the page says it, and coming here again."""

import re
import uuid

from payments.payment.identity import payment_id_for
from tests.legacy.conftest import Command, Node
from tests.legacy.node import ORDER_ID, insert
from tests.process import ROOT
from tests.support import History, append

PAGE = ROOT / "docs/migrating-from-node.md"
ZONE = ("--timezone", "Asia/Kolkata")


def test_what_happened_here_and_there_is_in_both(node: Node, payments: Command) -> None:
    refunded = insert(node, idempotency_key="refunded", provider_txn_id="t1")
    kept = insert(node, idempotency_key=None, provider_txn_id="t2")
    assert payments("import-legacy", *ZONE).exit_code == 0

    # Here one is charged, and the read model says that another one was given back since.
    history = History("here", order_id=ORDER_ID).charged()
    append(node, history.facts)
    node.execute(
        "INSERT INTO payments (id, merchant_order_id, idempotency_key, amount_cents, status,"
        " created_at) VALUES (%s, %s, 'here', 1500, 'SUCCESS', '2026-01-02 03:04:05')",
        [history.id, ORDER_ID],
    )
    node.execute(
        "UPDATE payments SET status = 'REFUNDED' WHERE id = %s", [payment_id_for("refunded")]
    )
    (statements,) = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    node.execute(statements.encode())
    rows = node.execute("SELECT id, status, created_at::text FROM payments").fetchall()
    assert sorted(rows) == sorted(
        [
            (uuid.UUID(refunded), "REFUNDED", "2025-06-01 12:00:00"),
            (uuid.UUID(kept), "SUCCESS", "2025-06-01 12:00:00"),
            (history.id, "SUCCESS", "2026-01-02 08:34:05"),
        ]
    )
    assert payments("migrate").exit_code == 1

    # There one more is charged, and one refunded.
    insert(node, idempotency_key="there", provider_txn_id="t3")
    node.execute("UPDATE payments SET status = 'REFUNDED' WHERE id = %s", [kept])
    before = node.execute("SELECT count(*) FROM payment_events").fetchone()
    done = payments("import-legacy", *ZONE)
    assert (done.exit_code, done.stdout.splitlines()[:-1]) == (
        1,
        [f"row {kept}: its status is REFUNDED, and its payment here is SUCCESS"],
    )
    assert node.execute("SELECT to_regclass('legacy_payments')").fetchone() == (None,)
    assert node.execute("SELECT count(*) FROM payment_events").fetchone() == before
    done = payments("import-legacy", *ZONE, "--leave-out-rows")
    assert "imported: 1 rows of 4\nleft out: 1 rows" in done.stdout
    known = node.execute("SELECT idempotency_key FROM payments").fetchall()
    assert {key for (key,) in known} == {"refunded", f" legacy:{kept}", "here", "there"}
    assert payments("migrate").exit_code == 0
