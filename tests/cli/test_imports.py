"""What a command does not need it does not import, and it tells nothing but what it is asked."""

import subprocess
import sys
import uuid
from pathlib import Path

import click
import pytest

from payments.cli import COMMANDS, main
from payments.database.connections import DatabaseAddress
from payments.embedded_postgres import wait_until_stopped
from tests.process import at, environment, open_directory, run
from tests.support import ORDER_ID

# Whatever ends the process, this comes last.
LISTED = (
    "import atexit, sys\n"
    "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))\n"
    "from payments.cli import main; main()"
)
SERVING = {"litestar", "uvicorn", "uvloop", "web", "httpx", "aiohttp", "httpcore", "h11"}
SERVING |= {"prometheus_client", "psutil", "opentelemetry", "payments.service"}
DATABASE = {"psycopg", "psycopg_pool", "asyncio", "eventsourcing", "loguru"}
LOOKS = [
    *("replay --limit 1", f"replay --as-of 1 --order {ORDER_ID}", f"explain {uuid.UUID(int=1)}"),
    *("audit head", "audit verify", "rebuild --dry-run", "parked list --format json", "migrate"),
    *("callbacks list --format json", f"callbacks show {uuid.UUID(int=1)}"),
    "callbacks redrive --dead",
]


def imported(command: str, **settings: object) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LISTED, *command.split()],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("command", ["--help", "--version", "settings --format json", "keys new x"])
def test_what_needs_no_database_imports_none(command: str) -> None:
    modules = imported(command)
    assert "payments.cli.exits" in modules
    assert not modules & (SERVING | DATABASE | {"rich"})


@pytest.mark.parametrize("command", LOOKS)
def test_what_looks_at_the_database_serves_nobody(address: DatabaseAddress, command: str) -> None:
    modules = imported(command, **at(address))
    assert "psycopg" in modules
    assert not modules & SERVING


def test_the_list_of_commands_says_what_they_say() -> None:
    """It is printed without importing them."""
    context = click.Context(main)
    for name, (_, sentence) in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None
        assert command.help is not None
        assert " ".join(command.help.split("\n\n")[0].split()) == sentence
        assert sentence in " ".join(main.get_help(context).split())
    assert main.get_command(context, "nonsense") is None


def test_a_command_begins_with_no_line_of_the_log() -> None:
    """Also where it starts the embedded server."""
    with open_directory("payments-quiet-") as data_dir:
        for level, lines in (("INFO", 0), ("DEBUG", 1)):
            done = run("replay", "--limit", "1", PAYMENTS_DATA_DIR=data_dir, LOG_LEVEL=level)
            assert (done.returncode, done.stdout) == (1, "")
            *log, told = done.stderr.splitlines()
            assert told.startswith("payments: the database lacks 0001_event_store")
            assert sum("embedded Postgres is running" in line for line in log) == lines
            assert len(log) == 2 * lines  # why the command ends
        done = run("migrate", PAYMENTS_DATA_DIR=data_dir, LOG_FORMAT="text")
        *applied, told = done.stderr.splitlines()
        assert told == "the schema is up to date"
        assert all("migration=" in line for line in applied)
        done = run("replay", "--limit", "1", PAYMENTS_DATA_DIR=data_dir)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until_stopped(data_dir)


def test_what_is_no_trouble_is_for_the_log_of_the_service(
    address: DatabaseAddress, tmp_path: Path
) -> None:
    """Whoever logs it."""
    (tmp_path / "talkative.py").write_text(
        "from loguru import logger\n"
        "def build(settings): logger.info('all is well'); logger.warning('trouble'); return 1\n"
    )
    given = {**at(address), "PYTHONPATH": tmp_path, "GATEWAY": "talkative:build"}
    done = run("doctor", **given)
    assert done.stdout.startswith("FAIL  settings   GATEWAY")
    assert "trouble" in done.stderr
    assert "all is well" not in done.stderr
    assert "all is well" in run("work", **given).stderr
