"""`payments log accept-loss`, and what an audit says of a log that lost events."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import Result

from payments.database.connections import DatabaseAddress
from payments.events.losses import DATABASE_ID
from payments.events.watch import KeptHead, write_head
from tests.lost_log import lose_after
from tests.support import History, append, catch_up, log_id

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]
ACCEPT = ("log", "accept-loss", "--by", "Ada", "--reason", "failover of 28 November, compared")


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAYMENTS_DATA_DIR", str(tmp_path))
    return tmp_path


def grow(
    address: DatabaseAddress, connection: Connection, name: str, payments: int
) -> dict[int, str]:
    """So many payments more, sealed and followed; every head by its position."""
    for number in range(payments):
        append(connection, History(f"{name} {number}").charged().facts)
    catch_up(address)
    rows = connection.execute("SELECT position, hash FROM log_seals").fetchall()
    return {position: f"{position}:{hash.hex()}" for position, hash in rows}


def oid(connection: Connection) -> int:
    row = connection.execute(DATABASE_ID.encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_a_kept_head_finds_the_loss_and_a_person_accepts_it(
    address: DatabaseAddress, connection: Connection, operator: Operator
) -> None:
    old = grow(address, connection, "before", 4)
    lose_after(connection, 6)
    new = grow(address, connection, "after", 3)
    unfit = operator("audit", "verify", "--head", old[8])
    assert unfit.exit_code == 1
    assert "is not the log of the head 8:" in unfit.stdout
    done = operator(*ACCEPT, "--head", old[8], "--head", old[5])
    assert done.exit_code == 0, done.output
    assert "kept: at least up to position 5" in done.stdout
    assert f"old head: {old[8]}" in done.stdout
    assert f"new head: {new[12]}" in done.stdout
    verified = operator("audit", "verify", "--head", old[8], "--head", old[7], "--head", old[5])
    assert verified.exit_code == 0, verified.output
    assert "head 8:…: was lost by a failover or a restore, as Ada accepted" in verified.stdout
    assert (
        "loss: events up to position 8 were lost, none up to 5; accepted by Ada" in verified.stdout
    )


def test_a_head_of_what_was_kept_must_still_fit(
    address: DatabaseAddress, connection: Connection, operator: Operator
) -> None:
    old = grow(address, connection, "before", 4)
    lose_after(connection, 6)
    grow(address, connection, "after", 3)
    operator(*ACCEPT, "--head", old[8], "--head", old[5])
    wrong = f"4:{'00' * 32}"
    assert operator("audit", "verify", "--head", wrong).exit_code == 1
    beyond = f"99:{'00' * 32}"
    assert operator("audit", "verify", "--head", beyond).exit_code == 1


def test_the_head_in_the_data_directory_is_looked_at(
    address: DatabaseAddress, connection: Connection, operator: Operator, data_dir: Path
) -> None:
    old = grow(address, connection, "before", 4)
    write_head(
        data_dir,
        KeptHead(
            log=UUID(log_id(connection)),
            database=oid(connection),
            position=8,
            hash=old[8].partition(":")[2],
        ),
    )
    lose_after(connection, 6)
    assert operator(*ACCEPT).exit_code == 0
    assert operator("audit", "verify", "--head", old[8]).exit_code == 0


def test_every_head_is_compared_not_only_the_newest(
    address: DatabaseAddress, connection: Connection, operator: Operator, data_dir: Path
) -> None:
    """Nobody noticed: the log has grown beyond the old head, and what is kept is of the new one."""
    old = grow(address, connection, "before", 4)
    lose_after(connection, 6)
    new = grow(address, connection, "after", 4)
    hash = new[14].partition(":")[2]
    write_head(
        data_dir,
        KeptHead(log=UUID(log_id(connection)), database=oid(connection), position=14, hash=hash),
    )
    done = operator(*ACCEPT, "--head", old[8], "--head", old[7], "--head", old[4])
    assert done.exit_code == 0, done.output
    assert f"old head: {old[8]}" in done.stdout
    verified = operator("audit", "verify", "--head", old[7])
    assert verified.exit_code == 0, verified.output
    assert operator("audit", "verify", "--head", f"4:{'00' * 32}").exit_code == 1


def test_a_loss_that_nobody_has_accepted_is_a_finding(
    address: DatabaseAddress, connection: Connection, operator: Operator
) -> None:
    grow(address, connection, "before", 2)
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, head_position)"
        " VALUES ('found', 'api-1:7', 'lacks', 2, 9, 4)"
    )
    found = operator("audit", "verify")
    assert found.exit_code == 1
    assert re.search(
        r"position 3: acknowledged events are missing up to position 9 \(found by api-1:7\)",
        found.stdout,
    )
    assert operator(*ACCEPT).exit_code == 0
    assert operator("audit", "verify").exit_code == 0


def test_without_a_loss_there_is_nothing_to_accept(
    address: DatabaseAddress, connection: Connection, operator: Operator
) -> None:
    heads = grow(address, connection, "before", 2)
    refused = operator(*ACCEPT, "--head", heads[4])
    assert refused.exit_code == 1
    assert "nothing is lost" in refused.stderr
    assert connection.execute("SELECT FROM log_losses").fetchall() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--by", "Ada"),
        ("--reason", "x"),
        ("--by", "", "--reason", "x"),
        ("--by", "Ada\nBob", "--reason", "x"),
        ("--by", "Ada", "--reason", "x" * 501),
        ("--by", "Ada", "--reason", "x", "--head", "8"),
    ],
)
def test_who_and_why_must_be_said(operator: Operator, arguments: tuple[str, ...]) -> None:
    assert operator("log", "accept-loss", *arguments).exit_code == 2
