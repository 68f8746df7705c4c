"""Clients that generators make of the API's description: type checked, and used once.

Of the long run alone: the generators are installed for it, by npm and pip, in the versions that
typescript/package-lock.json and requirements/generators.txt name.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from payments.database.connections import DatabaseAddress
from tests.process import ROOT, ServiceProcess, at, environment

TYPESCRIPT = Path(__file__).parent / "typescript"
PACKAGE = "payment_service_client"
TSC = ("--strict", "--noUncheckedIndexedAccess", "--module", "nodenext", "--target", "es2022")

USE = """
import sys
from datetime import datetime
from uuid import UUID

from payment_service_client import AuthenticatedClient
from payment_service_client.api.payments import charge, get_payment, list_payments, refund
from payment_service_client.models import ChargeAnswer, ChargeBody, PaymentPage, PaymentView
from payment_service_client.models import Problem, RefundBody, Status

ORDER = UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")


def use(url: str) -> tuple[Status, datetime, str | None, str, int]:
    with AuthenticatedClient(base_url=url, token="of no matter here") as client:
        body = ChargeBody(merchant_order_id=ORDER, amount_cents=1500)
        charged = charge.sync(client=client, body=body, idempotency_key="python")
        assert isinstance(charged, ChargeAnswer)
        read = get_payment.sync(charged.id, client=client, as_of=datetime(2999, 1, 1).astimezone())
        assert isinstance(read, PaymentView)
        page = list_payments.sync(client=client, limit=5, merchant_order_id=ORDER)
        assert isinstance(page, PaymentPage)
        too_much = RefundBody(payment_id=charged.id, amount_cents=1501)
        refused = refund.sync(client=client, body=too_much, idempotency_key="python")
        assert isinstance(refused, Problem)
        return charged.status, read.created_at, page.next_cursor, refused.code, refused.status


if __name__ == "__main__":
    print(*use(sys.argv[1]), sep="|")
"""


@pytest.fixture
def service(long_run: bool, address: DatabaseAddress, tmp_path: Path) -> Iterator[ServiceProcess]:
    if not long_run:
        pytest.skip("the generators are installed in the long run only (--long)")
    with ServiceProcess(tmp_path, **at(address)) as running:
        yield running


def run(*command: str | Path, cwd: Path) -> str:
    # The tools that were installed for the test come first: the generator looks for its own ruff.
    path = f"{cwd / 'venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env=environment(PATH=path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def document(service: ServiceProcess, directory: Path) -> Path:
    path = directory / "openapi.json"
    path.write_bytes(httpx.get(f"{service.url}/schema/openapi.json").content)
    return path


@pytest.mark.timeout(600)
def test_typescript(service: ServiceProcess, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: no client in TypeScript is generated")
    project = shutil.copytree(TYPESCRIPT, tmp_path / "typescript")
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=project)
    tools = project / "node_modules" / ".bin"
    generated = document(service, project)
    run(tools / "openapi-typescript", generated, "-o", "payments.ts", cwd=project)
    run(tools / "tsc", *TSC, "use.ts", "payments.ts", cwd=project)
    told = json.loads(run("node", "use.js", service.url, cwd=project))
    assert told.pop("created")
    expected = {"status": "SUCCESS", "cursor": None, "code": "refund_exceeds_capture"}
    assert told == expected | {"status_of": 409}


@pytest.mark.timeout(600)
def test_python(service: ServiceProcess, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    locked = ROOT / "requirements" / "generators.txt"
    run(venv / "bin" / "pip", "install", "--require-hashes", "-r", locked, cwd=tmp_path)
    generate = (venv / "bin" / "openapi-python-client", "generate", "--fail-on-warning")
    described = document(service, tmp_path)
    run(*generate, "--meta", "none", "--path", described, "--output-path", PACKAGE, cwd=tmp_path)
    (tmp_path / "use.py").write_text(USE)
    python = f"--python-executable={venv / 'bin' / 'python'}"
    # Without client.py, which is the same for every API, and not strictly typed.
    checked = ("use.py", f"{PACKAGE}/api", f"{PACKAGE}/models", "--follow-imports=silent")
    run(sys.executable, "-m", "mypy", "--strict", python, *checked, cwd=tmp_path)
    told = run(venv / "bin" / "python", "use.py", service.url, cwd=tmp_path).strip().split("|")
    assert told[0] == "SUCCESS"
    assert told[2:] == ["None", "refund_exceeds_capture", "409"]
