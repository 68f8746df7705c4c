"""What the pages under docs/ say is what the code does."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import web.app  # noqa: F401 - defines every error of the API
from payments.database import DatabaseAddress
from payments.errors import PaymentsError
from tests.process import ROOT, ServiceProcess, at
from tests.support import ORDER_ID
from web.heads import PROTOCOL_PROBLEMS
from web.problems import FRAMEWORK_PROBLEMS


def subclasses(kind: type[PaymentsError]) -> Iterator[type[PaymentsError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_the_page_on_errors_lists_every_code_with_its_status() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    listed = {(int(status), code) for status, code in re.findall(r"\| (\d+) \| `(\w+)` \|", page)}
    errors: list[type[PaymentsError]] = [PaymentsError, *subclasses(PaymentsError)]
    answered = {(error.status, error.code) for error in errors if "code" in vars(error)}
    answered |= {(status, code) for status, (code, _) in FRAMEWORK_PROBLEMS.items()}
    assert listed == answered | set(PROTOCOL_PROBLEMS)


@pytest.fixture
def example() -> Callable[..., dict[str, Any] | None]:
    """The client that the page for Order Service shows."""
    page = (ROOT / "docs/order-service.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/order-service.md", "exec"), names)
    return names["charge"]  # type: ignore[no-any-return]


def test_the_client_for_order_service_comes_to_an_outcome(
    example: Callable[..., dict[str, Any] | None], address: DatabaseAddress, tmp_path: Path
) -> None:
    """Captured, declined, the answer lost on the way, the provider away for a moment."""
    faults = {"SIMULATED_FAULTS": "answer_lost*1", "CHARGE_DEADLINE_S": 0.6}
    settings: dict[str, Any] = at(address) | faults | {"GATEWAY_TIMEOUT_S": 0.5}
    with (
        ServiceProcess(tmp_path, **settings) as service,
        httpx.Client(base_url=service.url) as client,
    ):
        charges = {"a": 1500, "b": 1507, "a again": 1500}
        outcomes = {
            key: example(client, str(ORDER_ID), key.split()[0], amount, hold_s=20)
            for key, amount in charges.items()
        }
        found = {key: outcome and outcome["status"] for key, outcome in outcomes.items()}
        assert found == {"a": "SUCCESS", "b": "FAILED", "a again": "SUCCESS"}
        assert outcomes["a"] == outcomes["a again"]
        with pytest.raises(ValueError, match="another amount_cents"):
            example(client, str(ORDER_ID), "a", 1600, hold_s=20)
    unknown = httpx.Client(base_url=service.url)  # nobody listens there any more
    with unknown:
        assert example(unknown, str(ORDER_ID), "c", 1500, hold_s=1) is None
