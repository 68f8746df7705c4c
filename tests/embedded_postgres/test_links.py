"""What the account that Postgres runs as may put into its directories does not lead root astray."""

import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from payments import embedded_postgres
from payments.embedded_postgres import EmbeddedPostgresError, start, supervisor
from payments.embedded_postgres import _server_user as server_user
from tests.embedded_postgres.servers import (
    CLEAN_STOP_S,
    as_root,
    assert_fails,
    assert_gone,
    plan_of,
    wait_until,
)

SECRET = "canary5ecretcanary5ecret"


@pytest.fixture
def cluster(data_dir: Path) -> Path:
    """Of a server that has stopped."""
    start(data_dir).release()
    assert_gone(data_dir, CLEAN_STOP_S)
    return data_dir / "postgres" / "cluster"


@pytest.fixture
def secret(room: Path) -> Path:
    """A file that only root may read."""
    path = room / "secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def in_time() -> Iterator[None]:
    """Opening a pipe that nobody writes to would wait for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def replace(path: Path, kind: str, target: Path) -> None:
    """As the owner of its directory may."""
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path, 0o666)
    else:
        path.mkdir()


@as_root
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_the_version_that_is_none(data_dir: Path, cluster: Path, secret: Path, kind: str) -> None:
    replace(cluster / "PG_VERSION", kind, secret)
    with pytest.raises(EmbeddedPostgresError, match="is not a Postgres cluster") as raised:
        start(data_dir)
    assert SECRET not in str(raised.value)
    wait_until(lambda: SECRET not in (data_dir / "postgres" / "server.log").read_text(), 1)


@pytest.mark.parametrize("text", [SECRET, "", "18; rm", "١٨", "-1", "1" * 5000])
def test_a_version_that_is_no_number_is_not_repeated(data_dir: Path, text: str) -> None:
    cluster = data_dir / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text(text)
    with pytest.raises(EmbeddedPostgresError, match="is not a Postgres cluster") as raised:
        start(data_dir)
    said = str(raised.value).replace(str(data_dir), "")  # its name is drawn
    assert not text or text not in said


@as_root
@pytest.mark.usefixtures("in_time")
def test_a_pid_file_that_is_a_link(data_dir: Path, cluster: Path, secret: Path) -> None:
    """Postgres itself refuses it."""
    replace(cluster / "postmaster.pid", "link", secret)
    with pytest.raises(EmbeddedPostgresError, match=r"postmaster\.pid") as raised:
        start(data_dir)
    assert SECRET not in str(raised.value)
    assert secret.read_text() == f"{SECRET}\n"


@as_root
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_files_of_its_own_are_read(room: Path, secret: Path, kind: str) -> None:
    plan = plan_of(room, *server_user())
    replace(room / "file", kind, secret)
    assert supervisor._read(plan, room / "file") == ""
    assert supervisor._read(plan, secret) == ""
    secret.chmod(0o644)  # what it could read in another way is not read through a link either
    assert supervisor._read(plan, room / "file") == ""
    assert supervisor._read(plan, secret) == f"{SECRET}\n"


def test_no_more_is_read_than_such_a_file_may_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * 100_000)
    assert len(supervisor._read(plan_of(tmp_path), tmp_path / "file")) == supervisor.FILE_BYTES_MAX


def test_no_more_is_read_of_a_log_than_says_why_it_does_not_start(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("FATAL:  long ago\n" + "nothing new\n" * 10_000 + "the end\n")
    with pytest.raises(EmbeddedPostgresError, match="does not start: the end"):
        supervisor._require(False, "does not start", tmp_path, 0)


@as_root
def test_a_right_that_was_given_up_is_given_up_until_the_end(room: Path) -> None:
    plan = plan_of(room, *server_user())
    with supervisor._as_server_user(plan):
        with supervisor._as_server_user(plan):
            pass
        assert os.geteuid() == plan.uid
        assert os.getegid() == plan.gid
    assert os.geteuid() == os.getegid() == 0


@as_root
def test_a_link_in_place_of_the_socket_directory(data_dir: Path, room: Path) -> None:
    """Somebody else's socket, of the same name, is not removed."""
    other = room / "other"
    other.mkdir(mode=0o755)
    (other / supervisor.SOCKET_NAME).touch()
    with start(data_dir) as server:
        moved = server.socket_dir.rename(f"{server.socket_dir}.moved")
        server.socket_dir.symlink_to(other)
    wait_until(lambda: not (data_dir / "postgres" / "socket-directory").exists(), CLEAN_STOP_S)
    assert (other / supervisor.SOCKET_NAME).exists()
    server.socket_dir.unlink()
    shutil.rmtree(moved)


@as_root
@pytest.mark.parametrize("kind", ["link", "another's", "open", "its own", "missing"])
def test_which_socket_directory_is_taken_over(room: Path, kind: str) -> None:
    plan = plan_of(room, *server_user())
    own, path = room / "own", room / "path"
    own.mkdir(mode=0o700)
    supervisor._give(plan, own)
    if kind == "link":
        path.symlink_to(own)
    elif kind != "missing":
        own.rename(path)
    if kind == "another's":
        os.chown(path, 12345, 12345)
        assert not supervisor._take_over(plan_of(room), path)  # nor for who could use it
    if kind == "open":
        path.chmod(0o770)
    assert supervisor._take_over(plan, path) is (kind in ("its own", "missing"))
    if kind == "missing":
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (plan.uid, 0o700)


@as_root
def test_nothing_is_given_away_through_a_link(room: Path, secret: Path) -> None:
    (room / "directory").mkdir()
    (room / "link").symlink_to(room / "directory")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        supervisor._give(plan_of(room, *server_user()), room / "link")
    assert (room / "directory").stat().st_uid == 0


@as_root
def test_a_link_in_place_of_a_directory_that_was_just_made(
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private = room / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: path.symlink_to(private))
    with pytest.raises(EmbeddedPostgresError):
        start(room / "data")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@as_root
def test_a_data_directory_of_the_servers_user(data_dir: Path) -> None:
    data_dir.mkdir()
    uid, _ = embedded_postgres._server_user()
    assert uid is not None
    os.chown(data_dir, uid, -1)
    assert_fails(data_dir, f"{data_dir} belongs to the user nobody", "PAYMENTS_DATA_DIR")
    assert not (data_dir / "postgres" / "server.log").exists()
