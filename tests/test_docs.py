"""What the pages say is what the code does."""

import base64
import importlib
import json
import operator
import re
import secrets
import shlex
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import click
import httpx
import pytest
from standardwebhooks import Webhook

from payments import errors
from payments.callbacks.dispatcher import CallbackBody
from payments.callbacks.retry import WAIT_MAX_S, schedule
from payments.cli import main
from payments.database.connections import DatabaseAddress
from payments.errors import PaymentsError
from payments.observability.metrics import CALLBACK_OUTCOMES, Telemetry
from payments.order_service.responses import CONFIRMED, FAILED, read_status, said_of
from payments.queries.callbacks import CallbackView
from payments.queries.fulfilments import Said, State
from payments.settings import VARIABLES
from tests.process import ROOT, ServiceProcess, at, invoke
from tests.support import ORDER_ID, eventually, subclasses
from web import problems

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_on_errors_lists_every_code_with_its_status() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    listed = {(int(status), code) for status, code in re.findall(r"\| (\d+) \| `(\w+)` \|", page)}
    kinds: list[type[PaymentsError]] = [PaymentsError, *subclasses(PaymentsError)]
    answered = {(error.status, error.code) for error in kinds if "code" in vars(error)}
    assert listed == answered


def test_every_error_is_drawn_in_the_tree_of_its_module() -> None:
    """Of one of two, with its code and its status, if they are its own."""
    found = list(subclasses(PaymentsError))
    assert {error.__module__ for error in found} == {errors.__name__, problems.__name__}
    for module in (errors, problems):
        drawn = re.findall(r"── (\w+)(?: +(\d+))?(?: +(\w+))?$", module.__doc__ or "", re.M)
        there = {error.__name__: error for error in found if error.__module__ == module.__name__}
        assert sorted(name for name, _, _ in drawn) == sorted(there)
        for name, status, code in drawn:
            assert status in ("", str(there[name].status)), name
            assert status or "status" not in vars(there[name]), name
            assert code == vars(there[name]).get("code", ""), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links within the repository, metrics, settings, commands."""
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^():#]*)(#[^()]*)?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, target + anchor
    telemetry = Telemetry()
    telemetry.observed(up=True)
    telemetry.dispatches()
    telemetry.role.labels("api")
    telemetry.of_gateway("simulated", lambda: False)
    telemetry.unconfigured.labels("acme").set(1)
    telemetry.hints_of_gateway("acme")
    exposed = telemetry.exposition().decode()
    for metric in re.findall(r"`(payments_\w+)", text):
        assert re.search(rf"^{metric}(_count)?[ {{]", exposed, re.MULTILINE), metric
    for name in re.findall(r"\b(?:ORDER|CALLBACK)_[A-Z_]*[A-Z]\b", text):
        assert name.removesuffix("_FILE") in VARIABLES, name
    for words in re.findall(r"(?:`|bin/)payments ([a-z][^`\n#|>]*)", text):
        options = {option for parameter in named(words).params for option in parameter.opts}
        assert set(re.findall(r"--\w[\w-]*", words)) <= options | {"--help"}, words


def named(words: str) -> click.Command:
    """The command that a line calls."""
    command: click.Command | None = main
    for word in words.split():
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), word)
    assert command is not None, words
    return command


def slug(heading: str) -> str:
    """The anchor that GitHub makes of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


README = ROOT / "README.md"
LINES_MAX, BYTES_MAX = 120, 7 * 1024


def test_the_lines_of_the_readme_do_what_it_says(address: DatabaseAddress, tmp_path: Path) -> None:
    """Charge, the same again, another amount, read, refund: the words of each curl line."""
    text = README.read_text()
    lines = re.findall(r"^curl (.*?)(?=\n\n|\n```)", text, re.M | re.S)
    (answer,) = re.findall(r'^\{"id":.*\}$', text, re.M)
    with ServiceProcess(tmp_path, **at(address)) as service:

        def send(line: str, amount_cents: int = 1500) -> httpx.Response:
            method, url, headers, body = "", "", {}, None
            words = iter(shlex.split(line))
            for word in words:
                if word == "-X":
                    method = next(words)
                elif word == "-H":
                    name, value = next(words).split(": ")
                    headers[name] = value
                elif word == "-d":
                    body = next(words).replace("1500", str(amount_cents))
                else:
                    url = word.replace("http://localhost:4004", service.url)
            return httpx.request(method, url, headers=headers, content=body, timeout=10)

        charge, read, refund = lines
        first, again = send(charge), send(charge)
        assert (first.status_code, first.text) == (201, answer)
        assert (again.status_code, again.text) == (201, answer)
        assert again.headers["Idempotent-Replayed"] == "true"
        assert send(charge, 1600).status_code == 422
        assert send(read).json()["status"] == "SUCCESS"
        given_back = send(refund)
        assert (given_back.status_code, given_back.json()["status"]) == (201, "REFUNDED")


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= LINES_MAX
    assert len(text.encode()) <= BYTES_MAX


def test_the_recorded_session_ends_well() -> None:
    drawn = ElementTree.parse(ROOT / "docs/session.svg").getroot()
    lines = ["".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert any("kill -9" in line for line in lines)
    killed = next(at for at, line in enumerate(lines) if "kill -9" in line)
    assert '"status":"SUCCESS"' in "".join(lines[killed:])


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {
        (index.parent / target).resolve()
        for target in re.findall(r"\]\(([^():#]+)(?:#[^()]*)?\)", index.read_text())
    }
    assert set(PAGES) - linked == {index}


def test_every_stop_of_the_tour_is_a_function_that_is_there() -> None:
    page = (ROOT / "docs/tour.md").read_text()
    stops = re.findall(r"^## \d\. .*\n\n\[`(\S+)`\]\(\.\./src/(\S+)\.py\): `(\S+)`$", page, re.M)
    assert len(stops) == 8
    for shown, path, name in stops:
        assert shown == f"{path}.py"
        module = importlib.import_module(path.replace("/", "."))
        function = operator.attrgetter(name)(module)
        assert callable(getattr(function, "fn", function)), name  # a route has its function in fn


def test_the_page_on_settings_has_every_setting_once() -> None:
    listed = first_cells(ROOT / "docs/settings.md", "variable")
    assert sorted(listed) == sorted(VARIABLES)


DECISION = ["Question", "Choice", "Measured", "What would change it"]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/decisions").glob("*.md")), ids=lambda page: page.stem
)
def test_a_decision_has_a_date_a_status_and_four_headings(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == DECISION
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert re.fullmatch(
        r"Decided \d{4}-\d\d-\d\d, revised \d{4}-\d\d-\d\d\. Status: in force\.", lines[2]
    )


CALLBACKS = ROOT / "docs/callbacks.md"


def first_cells(page: Path, heading: str) -> list[str]:
    """Of the table with this first cell; the names in it."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)*)", page.read_text(), re.M)
    return [
        name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]


def test_the_page_on_callbacks_has_every_field_state_and_outcome() -> None:
    assert first_cells(CALLBACKS, "field") == list(CallbackBody.__struct_fields__)
    states = get_args(CallbackView.__annotations__["state"])
    assert first_cells(CALLBACKS, "state") == list(states)
    assert first_cells(CALLBACKS, "`outcome`") == [*CALLBACK_OUTCOMES, "interrupted"]


def test_every_callback_that_a_page_shows_has_the_fields_of_one() -> None:
    shown = [
        body
        for page in PAGES
        for body in re.findall(r'^\{"order_id":.*\}$', page.read_text(), re.M)
    ]
    assert len(shown) >= 2
    for body in shown:
        assert list(json.loads(body)) == list(CallbackBody.__struct_fields__)


def rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.0f} h"


def test_the_page_on_callbacks_has_the_schedule_of_retries() -> None:
    steps = schedule()
    growing = [step for step in steps if step.wait_max_s < WAIT_MAX_S]
    first, last = steps[len(growing)], steps[-1]
    rows = [
        f"| {attempt} | {rounded(wait_max_s)} | {rounded(expected_s)} |"
        for attempt, wait_max_s, expected_s in growing
    ]
    rows.append(
        f"| {first.attempt} to {last.attempt} | {rounded(WAIT_MAX_S)} each"
        f" | {rounded(first.expected_s)} to {rounded(last.expected_s)} |"
    )
    (table,) = re.findall(r"^\| attempt \|.*\n\|---.*\n((?:\|.*\n)*)", CALLBACKS.read_text(), re.M)
    assert table.splitlines() == rows
    assert f"dead after {last.attempt} attempts, but not before 72 h" in CALLBACKS.read_text()
    assert round(last.expected_s / 3600) == 72


def code_of(name: str) -> dict[str, Any]:
    """What the one example on the page for Order Service defines that defines this name."""
    page = (ROOT / "docs/order-service.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = [block for block in blocks if f"\ndef {name}(" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/order-service.md", "exec"), names)
    return names


@pytest.fixture
def example() -> Callable[..., dict[str, Any] | None]:
    """The client that the page for Order Service shows."""
    return code_of("charge")["charge"]  # type: ignore[no-any-return]


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
        with pytest.raises(ValueError, match="different amount_cents"):
            example(client, str(ORDER_ID), "a", 1600, hold_s=20)
    unknown = httpx.Client(base_url=service.url)  # nobody listens there any more
    with unknown:
        assert example(unknown, str(ORDER_ID), "c", 1500, hold_s=1) is None


def new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(25)).decode()}"


OLD, NEW, OTHER = new_secret(), new_secret(), new_secret()


class Receiver:
    """The receiver that the page for Order Service shows, running; it knows the OLD secret."""

    def __init__(self, names: dict[str, Any], url: str) -> None:
        self.names = names
        self.url = url
        self.answered = b""

    def sql(self, statement: str) -> list[Any]:
        with closing(sqlite3.connect(self.names["DATABASE"])) as db, db:
            return db.execute(statement).fetchall()

    @property
    def orders(self) -> dict[str, str]:
        return dict(self.sql("SELECT id, status FROM orders"))

    @property
    def tickets(self) -> list[str]:
        return [order for (order,) in self.sql("SELECT order_id FROM tickets")]

    @property
    def events(self) -> set[str]:
        return {event for (event,) in self.sql("SELECT event_id FROM told")}

    def take(self, body: dict[str, Any], signed_with: tuple[str, ...] = (OLD,)) -> int:
        """The answer to a callback that is signed by the standard's own library."""
        text = json.dumps(body)
        return self.post(text, signed(text, body["event_id"], signed_with))

    def post(self, text: str, headers: dict[str, str]) -> int:
        answer = httpx.post(self.url, content=text, headers=headers, timeout=10)
        self.answered = answer.content
        return answer.status_code

    def look_up(self, order_id: str) -> httpx.Response:
        """As ORDER_STATUS_URL is asked."""
        url = self.url.removesuffix("/callback") + f"/orders/{order_id}"
        return httpx.get(url, timeout=10)


def signed(
    text: str, message_id: str, signed_with: tuple[str, ...] = (OLD,), late_s: float = 0
) -> dict[str, str]:
    moment = datetime.now(UTC) - timedelta(seconds=late_s)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(
            Webhook(secret).sign(message_id, moment, text) for secret in signed_with
        ),
    }


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    names = code_of("receive")
    names |= {"SECRETS": [OLD], "DATABASE": str(tmp_path / "orders.db")}
    with closing(sqlite3.connect(names["DATABASE"])) as db:
        db.executescript(names["TABLES"])
    with ThreadingHTTPServer(("127.0.0.1", 0), names["Receiver"]) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield Receiver(names, f"http://127.0.0.1:{server.server_port}/callback")
        server.shutdown()
        thread.join()


def told(status: str = "SUCCESS", **changed: Any) -> dict[str, Any]:
    body = {"order_id": str(ORDER_ID), "payment_id": str(uuid.uuid4()), "status": status}
    body |= {"event_id": str(uuid.uuid4()), "occurred_at": "2026-01-31T18:30:00.25Z"}
    return body | {"sequence": 2, "amount_cents": 1500, "currency": "INR"} | changed


def test_the_receiver_takes_only_what_is_signed(receiver: Receiver) -> None:
    body = told()
    text, event_id = json.dumps(body), body["event_id"]
    good = signed(text, event_id)
    signature = good["webhook-signature"]
    for wrong in (
        {},
        signed(text, event_id, (OTHER,)),
        signed(text + " ", event_id),
        signed(text, event_id, late_s=310),
        signed(text, event_id, late_s=-310),
        good | {"webhook-id": str(uuid.uuid4())},
        good | {"webhook-timestamp": str(int(good["webhook-timestamp"]) + 1)},
        good | {"webhook-timestamp": ""},
        good | {"webhook-timestamp": "9" * 5000},
        good | {"webhook-signature": ""},
        good | {"webhook-signature": "v1,"},
        good | {"webhook-signature": signature.replace("v1,", "v2,")},
        good | {"webhook-signature": signature.removeprefix("v1,")},
        good | {"webhook-signature": "v1,\xe9"},
    ):
        head = {name: value.encode("latin-1") for name, value in wrong.items()}
        assert receiver.post(text, head) == 401, wrong  # type: ignore[arg-type]
    assert not receiver.events
    assert receiver.post(text, good) == 200
    assert receiver.events == {event_id}


def test_the_receiver_knows_several_secrets_and_takes_several_signatures(
    receiver: Receiver,
) -> None:
    assert receiver.take(told(), (OTHER, NEW)) == 401
    assert receiver.take(told(), (NEW, OLD)) == 200
    receiver.names["SECRETS"] = [NEW, OLD.rstrip("=")]
    assert receiver.take(told(), (OLD,)) == 200
    assert receiver.take(told(), (NEW,)) == 200
    assert len(receiver.events) == 3


def test_the_receiver_does_an_event_once(receiver: Receiver) -> None:
    body = told()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(receiver.take, [body] * 24)) == {200}
    assert receiver.orders == {str(ORDER_ID): "CONFIRMED"}
    assert receiver.tickets == [str(ORDER_ID)]


def test_a_repeated_callback_does_nothing_to_an_order_that_went_on(receiver: Receiver) -> None:
    """The customer tries another card, and the answer to the first one's FAILED got lost."""
    body = told("FAILED")
    assert receiver.take(body) == 200
    receiver.sql("UPDATE orders SET status = 'PENDING'")
    assert receiver.take(body) == 200
    assert receiver.orders == {str(ORDER_ID): "PENDING"}


def test_the_receiver_ignores_what_is_older_in_its_payment(receiver: Receiver) -> None:
    payment_id = str(uuid.uuid4())
    assert receiver.take(told("REFUNDED", payment_id=payment_id, sequence=4)) == 200
    assert receiver.take(told("SUCCESS", payment_id=payment_id, sequence=2)) == 200
    assert (receiver.orders, receiver.tickets) == ({}, [])
    assert receiver.take(told("SUCCESS", sequence=2)) == 200  # of another payment
    assert receiver.orders == {str(ORDER_ID): "CONFIRMED"}


def test_the_receiver_never_unconfirms_an_order(receiver: Receiver) -> None:
    statuses = ("FAILED", "SUCCESS", "FAILED", "SUCCESS", "REFUNDED")
    found: list[str] = []
    for status in statuses:
        assert receiver.take(told(status)) == 200
        found += receiver.orders.values()
    assert found == ["FAILED", "CONFIRMED", "CONFIRMED", "CONFIRMED", "CONFIRMED"]
    assert receiver.tickets == [str(ORDER_ID)]


def test_the_receiver_notes_what_is_paid_twice(receiver: Receiver) -> None:
    first, second = told("SUCCESS"), told("SUCCESS")
    assert first["payment_id"] != second["payment_id"]
    for _ in range(2):
        for body in (first, second):
            assert receiver.take(body) == 200
    assert receiver.tickets == [str(ORDER_ID)]
    paid_again = [(str(ORDER_ID), second["payment_id"])]
    assert receiver.sql("SELECT order_id, payment_id FROM paid_again") == paid_again


def test_what_the_receiver_answers_says_what_became_of_the_order(receiver: Receiver) -> None:
    """In words that the service understands: in the response, and when it is asked."""
    unknown = receiver.look_up(str(ORDER_ID))
    content_type = unknown.headers["content-type"]
    assert read_status(unknown.status_code, content_type, unknown.content, ORDER_ID).problem
    for status, verdict in (
        ("FAILED", "failed"),
        ("SUCCESS", "confirmed"),
        ("FAILED", "confirmed"),
    ):
        assert receiver.take(told(status)) == 200
        assert said_of(receiver.answered, ORDER_ID) == verdict
        shown = receiver.look_up(str(ORDER_ID))
        content_type = shown.headers["content-type"]
        reading = read_status(shown.status_code, content_type, shown.content, ORDER_ID)
        assert (reading.verdict, reading.problem) == (verdict, None)
    again = told()
    for _ in range(2):
        assert receiver.take(again) == 200
        assert said_of(receiver.answered, ORDER_ID) == "nothing"  # it is paid twice: do ask
    other = uuid.uuid4()
    assert receiver.take(told("REFUNDED", order_id=str(other))) == 200
    assert said_of(receiver.answered, other) == "nothing"


def test_the_page_for_order_service_has_every_word_and_state() -> None:
    page = (ROOT / "docs/order-service.md").read_text()
    words = re.findall(r"^\| (`[A-Z`, ]+`) \| (?:fulfilled|failed) \|$", page, re.M)
    listed = [set(re.findall("[A-Z]+", found)) for found in words]
    assert listed == [CONFIRMED, FAILED]
    states = first_cells(ROOT / "docs/order-service.md", "state")
    assert sorted(states) == sorted(get_args(State))
    assert first_cells(CALLBACKS, "said") == list(get_args(Said))


def test_the_receiver_answers_2xx_only_when_all_is_stored(receiver: Receiver) -> None:
    body = told()
    receiver.sql("ALTER TABLE tickets RENAME TO away")
    assert receiver.take(body) == 503
    assert (receiver.orders, receiver.events) == ({}, set())
    receiver.sql("ALTER TABLE away RENAME TO tickets")
    assert receiver.take(body) == 200
    assert receiver.tickets == [str(ORDER_ID)]


def test_the_receiver_takes_what_the_service_sends(
    receiver: Receiver, address: DatabaseAddress, tmp_path: Path
) -> None:
    """Refused while it has another secret, taken when it has one of the two, and once more."""
    database: dict[str, Any] = at(address)
    told_to = {"ORDER_CALLBACK_URL": receiver.url, "ORDER_CALLBACK_SECRET": f"{NEW},{OLD}"}
    receiver.names["SECRETS"] = [OTHER]
    with (
        ServiceProcess(tmp_path, **database, **told_to) as service,
        httpx.Client(base_url=service.url) as client,
    ):

        def callback(payment: httpx.Response, state: str, attempts: int = 1) -> str:
            """The event_id of its only callback, when that is in this state."""
            path = f"/v1/payments/{payment.json()['id']}/callbacks"

            def found() -> str | None:
                (it,) = client.get(path).json()["callbacks"] or [{"state": "", "attempts": []}]
                is_there = it["state"] == state and len(it["attempts"]) >= attempts
                return str(it["event_id"]) if is_there else None

            return str(eventually(found))

        declined = service.charge(client, "a", amount_cents=1507)
        failed = callback(declined, "due")
        receiver.names["SECRETS"] = [OLD]
        assert callback(declined, "delivered", attempts=2) == failed
        assert receiver.orders == {str(ORDER_ID): "FAILED"}

        charged = service.charge(client, "b")
        success = callback(charged, "delivered")
        assert receiver.orders == {str(ORDER_ID): "CONFIRMED"}

        for event_id, code in ((success, 0), (failed, 1)):
            assert invoke("callbacks", "redrive", event_id, **database).returncode == code
        assert callback(charged, "delivered", attempts=2) == success
        assert callback(declined, "delivered", attempts=2) == failed
    assert receiver.orders == {str(ORDER_ID): "CONFIRMED"}
    assert receiver.tickets == [str(ORDER_ID)]
    assert receiver.events == {success, failed}
