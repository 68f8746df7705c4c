"""What other software leaves in a process's environment does not change what this one does."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import pq
from psycopg.sql import SQL, Identifier

from payments.cli.greeting import greeting, url_of
from payments.database.connections import DatabaseAddress
from payments.environment import LIBPQ, forget
from payments.migrations import known_migrations
from payments.probe import address as probed
from payments.settings import Settings
from tests.process import PAYMENTS, ROOT, ServiceProcess, at, environment, free_port, run
from tests.process import database_processes as processes
from tests.support import eventually
from web.serving import server as web_server

# Nothing listens there, and nobody has a file there.
ELSEWHERE = "127.83.91.7"
NOWHERE = "/nonexistent/canary"

# What stops or misleads a process of the library behind it.
HARMFUL = {
    "PGHOSTADDR": ELSEWHERE,  # libpq: connects there, whatever the host is
    "PGSERVICE": "canary",  # libpq: a file of services that has none of this name
    "PGREQUIREAUTH": "scram-sha-256",  # libpq: the embedded server asks for no password
    "PGTZ": "canary",  # libpq: a setting of the session that the server refuses
    "PGTARGETSESSIONATTRS": "standby",  # libpq
    "PSYCOPG_WAIT_FUNC": "canary",  # psycopg: refuses to be imported
    "LOGURU_INFO_NO": "canary",  # Loguru: refuses to be imported
    "TZINFO_TOPIC": "canary",  # eventsourcing: refuses to be imported
    "PROMETHEUS_MULTIPROC_DIR": NOWHERE,  # prometheus_client: cannot make its files there
    "SSLKEYLOGFILE": NOWHERE,  # ssl.create_default_context: cannot open it
    "WEB_CONCURRENCY": "auto",  # uvicorn.Config: is no number
    "FORWARDED_ALLOW_IPS": "*",  # uvicorn.Config
    "LITESTAR_DEBUG": "1",  # Litestar: shows tracebacks to clients
    "LITESTAR_PDB": "1",  # Litestar: a debugger that waits for stdin
    "AIOHTTP_NO_EXTENSIONS": "1",  # aiohttp: another parser
    "http_proxy": f"http://{ELSEWHERE}:1",  # httpx, urllib
    "ALL_PROXY": f"http://{ELSEWHERE}:1",
    "OTEL_TRACES_EXPORTER": "otlp,console,zipkin",  # OpenTelemetry, as its operator sets them
    "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    "PYTHONIOENCODING": "ascii",
    "PYTHONOPTIMIZE": "1",  # no assert is carried out
    "LC_ALL": "C",
    "TZ": "canary",
    "TMPDIR": NOWHERE,
    "HOME": NOWHERE,
    "DATABASE_PORT": "tcp://10.96.0.7:6432",  # Kubernetes
}


def test_of_libpqs_variables_those_of_tls_are_left_and_only_for_ones_own_server() -> None:
    names = {each.envvar.decode() for each in pq.Conninfo.get_defaults() if each.envvar}
    names |= {"PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ", "PGDATESTYLE", "PGGEQO", "PGDATA"}
    assert names >= LIBPQ
    given = dict.fromkeys(names, "x")
    for host, left in (
        ({}, set()),
        ({"DATABASE_HOST": ""}, set()),
        ({"DATABASE_HOST": "h"}, LIBPQ),
    ):
        environ = given | host
        forget(environ)
        assert environ.keys() - {"DATABASE_HOST"} == left


def test_what_the_libraries_read_is_known() -> None:
    """A new version of one that reads another variable is looked at before it is used."""
    harmless = {
        *("HOME", "PATH", "TERM", "COLUMNS", "LINES", "NO_COLOR", "COLORTERM", "FORCE_COLOR"),
        *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS", "JUPYTER_LINES"),  # Rich
        *("UNICODE_VERSION", "DATABRICKS_RUNTIME_VERSION"),
        *("PAGER", "LESS", "COMP_WORDS", "COMP_CWORD", "XDG_CONFIG_HOME"),  # Click
        *("CI", "PYCHARM_HOSTED"),  # Loguru, about terminals
        *("WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"),  # uvicorn, which is told both
        *("SSL_CERT_FILE", "SSL_CERT_DIR"),  # documented
        *("NETRC", "AIOHTTP_NOSENDFILE", "FOO"),  # aiohttp: not with trust_env, not its server
        *("PSUTIL_DEBUG", "SPHINX_BUILD", "PYTHONASYNCIODEBUG"),
        *("PROMETHEUS_DISABLE_CREATED_SERIES", "PROMETHEUS_LEGACY_NAME_VALIDATION"),
    }
    found = {name for package in PACKAGES for name in variables_read_by(package)}
    assert {"PSYCOPG_IMPL", "WEB_CONCURRENCY", "TZINFO_TOPIC"} <= found
    left = dict.fromkeys(found, "x")
    forget(left)
    assert left.keys() <= harmless


PACKAGES = (
    *("litestar", "eventsourcing", "psycopg", "psycopg_pool", "msgspec", "httpx", "httpx_aiohttp"),
    *("httpcore", "aiohttp", "prometheus_client", "psutil", "loguru", "uvicorn", "uvloop"),
    *("click", "rich", "litestar_offline_docs", "anyio", "certifi", "multidict", "yarl"),
    *("frozenlist", "aiosignal", "propcache"),
)
READING = re.compile(
    r"""(?:environ(?:\.get\(|\[)|getenv\()\s*f?["']([A-Za-z_]+)["']"""
    r"""|["']([A-Za-z_]+)["'] (?:not )?in (?:os\.)?environ"""
)


def variables_read_by(package: str) -> Iterator[str]:
    there = Path(httpx.__file__).parent.parent / package
    for path in there.rglob("*.py"):
        parts = path.relative_to(there).parts
        # Command lines and servers of the libraries' own, which nobody starts here.
        if {"tests", "cli", "main.py", "wsgi.py", "django"} & set(parts):
            continue
        for match in READING.finditer(path.read_text(encoding="utf-8")):
            name = match[1] or match[2]
            is_wsgis = name.startswith(("HTTP_", "REQUEST_", "PATH_", "QUERY_", "CONTENT_"))
            if (name.isupper() or name.startswith("prometheus_")) and not is_wsgis:
                yield name


@pytest.mark.parametrize("name", [name for name in HARMFUL if name != "TZ"])
def test_a_command_takes_no_notice(name: str) -> None:
    """Most harm is done when a library is imported."""
    done = run("settings", "--format", "json", **{name: HARMFUL[name]})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_service_takes_no_notice(
    tmp_path_factory: pytest.TempPathFactory, state_dir: Path
) -> None:
    data_dir = state_dir / "harmful"
    data_dir.mkdir()
    data_dir.chmod(0o755)
    with ServiceProcess(data_dir, **HARMFUL) as service, httpx.Client(trust_env=False) as client:
        assert service.charge(client, "k").status_code == 201
        assert client.get(f"{service.url}/metrics").status_code == 200
        assert service.terminate() == 0
    told = service.log.read_text()
    assert "Traceback" not in told
    assert "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is supported" in told
    eventually(lambda: not processes(data_dir))


def test_ones_own_server_is_the_one_that_is_named(address: DatabaseAddress) -> None:
    harmful = HARMFUL | {"PGSSLMODE": "prefer"}
    del harmful["DATABASE_PORT"], harmful["PGREQUIREAUTH"]
    assert run("migrate", **harmful, **at(address)).returncode == 0


def test_an_address_says_all_that_says_where(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a process that was not started as a command."""
    monkeypatch.setenv("PGHOSTADDR", ELSEWHERE)  # libpq: before the host
    with psycopg.connect(address.conninfo()) as connection:
        assert connection.info.dbname == address.dbname


def test_of_several_hosts_the_one_that_takes_events(address: DatabaseAddress) -> None:
    def told(host: str) -> Any:
        given = DatabaseAddress(
            host=host, port=5432, user="u", password=None, dbname="db"
        ).conninfo()
        return psycopg.conninfo.conninfo_to_dict(given).get("target_session_attrs")

    assert told("a,b,c") == "read-write"
    assert told("a") is None


BREAKS = {
    "the service": "import payments.service as a; a.Appender = broken",
    "the application": "import web.app as a; a.door = broken",
    "the server": "import web.serving.listening as a; a.Server._watch = broken",
    "the followers": "import payments.projections.follower as a; a.Follower.start = broken",
}


@pytest.mark.parametrize(
    ("command", "broken", "settings"),
    [
        ("serve --examples", "the service", {}),
        ("serve --examples", "the application", {}),
        ("serve --examples", "the server", {}),
        ("serve --examples", "the followers", {}),
        ("work", "the server", {"METRICS_PORT": 0}),
        ("work", "the service", {}),
        ("work", "the followers", {}),
    ],
)
def test_whatever_fails_while_the_service_starts_is_one_line(
    address: DatabaseAddress, tmp_path: Path, command: str, broken: str, settings: dict[str, Any]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import payments.environment as environment\n"
        "prepare = environment.prepare\n"
        "def broken(*_, **__): raise LookupError('on two\\nlines')\n"
        "def breaking():\n"
        "    prepare()\n"
        f"    {BREAKS[broken]}\n"
        "environment.prepare = breaking\n"
    )
    ports = {name: free_port() for name in ("PORT", *settings)}
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = run(
        *command.split(),
        **at(address) | ports,
        LOG_LEVEL="ERROR",
        PYTHONPATH=paths,
        PAYMENTS_DATA_DIR=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "payments: the service cannot start: LookupError: on two\n"


@contextmanager
def serving(address: DatabaseAddress, *shell: str, **settings: object) -> Iterator[Any]:
    """`payments serve` below a shell, and its port."""
    port = free_port()
    with subprocess.Popen(
        ["/bin/sh", "-c", *shell, "sh", *PAYMENTS, "serve"],
        env=environment(**at(address) | {"PORT": port, "SIMULATED_LEDGER": ""} | settings),
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            eventually(lambda: is_healthy(port), timeout_s=30)
            yield process, port
        finally:
            process.kill()


def is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_descriptors_that_are_closed(address: DatabaseAddress, closed: str) -> None:
    with serving(address, f'exec "$@" {closed}') as (process, _):
        process.terminate()
        assert process.wait(timeout=15) == 0


def test_what_is_read_from_a_closed_stdin_is_empty() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 0<&-', "sh", *PAYMENTS, *["audit", "verify", "--export", "-"]],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2)


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-16"}, {"LC_ALL": "C"}]
)
def test_programs_get_utf_8(encoding: dict[str, str]) -> None:
    done = subprocess.run(
        [*PAYMENTS, "settings"],
        env=environment(PAYMENTS_DATA_DIR="/tmp/grüße-支付", **encoding),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "/tmp/grüße-支付" in done.stdout.decode()


class TestSignals:
    def test_a_terminal_that_is_closed_stops_it_in_order(self, address: DatabaseAddress) -> None:
        with serving(address, 'exec "$@"') as (process, _):
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=15) == 0

    def test_nohup_keeps_it(self, address: DatabaseAddress) -> None:
        with serving(address, 'trap "" HUP; exec "$@"') as (process, port):
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
            assert is_healthy(port)
            assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=15) == 0


class TestDatabaseInAnotherEncoding:
    @pytest.fixture
    def latin1(self, server: DatabaseAddress) -> Iterator[DatabaseAddress]:
        name = Identifier("latin1")
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute(
                SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING LATIN1 LOCALE 'C'").format(name)
            )
            yield DatabaseAddress(
                host=server.host, port=server.port, user=server.user, password=None, dbname="latin1"
            )
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    def test_it_is_migrated_and_charged_with(self, latin1: DatabaseAddress, tmp_path: Path) -> None:
        with ServiceProcess(tmp_path, **at(latin1)) as service, httpx.Client() as client:
            assert service.charge(client, "k").json()["status"] == "SUCCESS"
            eventually(lambda: client.get(f"{service.url}/v1/payments").json()["payments"])
            assert service.terminate() == 0
        assert run("audit", "verify", **at(latin1)).returncode == 0

    def test_only_comments_of_migrations_hold_other_characters_than_ascii(self) -> None:
        for migration in known_migrations():
            for line in migration.sql.splitlines():
                assert line.isascii() or line.startswith("--"), migration


class TestProbe:
    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({}, ("127.0.0.1", 4004)),
            ({"PORT": "", "HOST": ""}, ("127.0.0.1", 4004)),
            ({"PORT": "8080", "HOST": "0.0.0.0"}, ("127.0.0.1", 8080)),
            ({"HOST": "::"}, ("127.0.0.1", 4004)),
            ({"HOST": "10.0.0.1"}, ("10.0.0.1", 4004)),
        ],
    )
    def test_where_it_asks(self, environ: dict[str, str], expected: tuple[str, int]) -> None:
        assert probed(environ) == expected

    def test_it_asks_the_service_and_no_proxy(self, address: DatabaseAddress) -> None:
        """urllib goes through the proxy that the environment names."""
        with serving(address, 'exec "$@"') as (_, port):
            assert self.ask(PORT=port) == 0
            assert self.ask("METRICS_PORT", "/metrics", METRICS_PORT=port) == 0
            assert self.ask("PORT", "/nowhere", PORT=port) == 1
        assert self.ask(PORT=port) == 1

    def ask(self, *arguments: str, **settings: object) -> int:
        proxies = dict.fromkeys(("http_proxy", "ALL_PROXY"), f"http://{ELSEWHERE}:1")
        return subprocess.run(
            [sys.executable, "-m", "payments.probe", *arguments],
            env=environment(**proxies, **settings),
            stderr=subprocess.PIPE,
            check=False,
        ).returncode


class TestGreeting:
    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            ("127.0.0.1", "http://127.0.0.1:4004"),
            ("0.0.0.0", "http://localhost:4004"),
            ("::", "http://localhost:4004"),
            ("::1", "http://[::1]:4004"),
            ("payments.internal", "http://payments.internal:4004"),
        ],
    )
    def test_addresses_work(self, host: str, expected: str) -> None:
        assert url_of(host, 4004) == expected

    def test_it_says_where_the_data_is(self, address: DatabaseAddress) -> None:
        embedded = greeting(Settings(payments_data_dir=Path("/srv/payments")), address)
        assert "Data: /srv/payments/postgres (embedded Postgres)\n" in embedded
        own = greeting(Settings(database_host="db", database_password="canary"), address)
        assert f"Data: Postgres, {address!r}\n" in own
        assert "canary" not in own

    def test_what_is_printed_works_once_it_is_printed(
        self, address: DatabaseAddress, tmp_path: Path
    ) -> None:
        port = free_port()
        process = subprocess.Popen(
            [*PAYMENTS, "serve", "--examples"],
            env=environment(**at(address), PORT=port, SIMULATED_LEDGER="", LOG_LEVEL="ERROR"),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            printed = [process.stderr.readline() for _ in range(9)]
            assert f"on http://127.0.0.1:{port} " in printed[1]
            script = tmp_path / "script"
            script.write_text("set -e\n" + "".join(printed[4:7]).replace("curl", "curl -sfS", 1))
            done = subprocess.run(["sh", script], capture_output=True, text=True, check=False)
            assert '"status":"SUCCESS"' in done.stdout, done.stderr
        finally:
            process.terminate()
            process.communicate(timeout=15)


def test_an_idle_connection_outlasts_a_load_balancers() -> None:
    """Who sends requests must be the first to close: most load balancers do after 60 s."""
    assert web_server.KEEP_ALIVE_S > 60 + 5


def test_idle_connections_do_not_hold_up_the_end(tmp_path: Path, address: DatabaseAddress) -> None:
    with ServiceProcess(tmp_path, **at(address)) as service:
        idle = []
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", service.port))
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in connection.recv(4096)
            idle.append(connection)
        assert service.terminate() == 0
        for connection in idle:
            assert connection.recv(4096) == b""
            connection.close()
