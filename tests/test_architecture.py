"""Rules that hold the code in its shape. Files are parsed here, never imported."""

import ast
import io
import re
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
LINES_MAX = 530
FUNCTION_LINES_MAX = 50
SUFFIXES = {"py", "sql", "md", "yml", "json", "jsonl", "lock"}

# From the bottom to the top. A module imports from the lines below its own, and from its own entry.
LAYERS = (
    (
        *("payments.money", "payments.times", "payments.tasks", "payments.webhook_secrets"),
        *("payments.environment", "payments.probe", "payments.backoff", "payments.clients"),
        "payments.http_url",
    ),
    (
        *("payments.errors", "payments.observability", "payments.embedded_postgres"),
        "payments.setting_values",
    ),
    ("payments.settings", "payments.admission", "payments.single_flight"),
    ("payments.database", "payments.setting_sources"),
    ("payments.migrations", "payments.events", "payments.order_service"),
    ("payments.payment", "payments.opening", "payments.unsettled", "payments.legacy_ids"),
    (
        *("payments.event_store", "payments.snapshot", "payments.gateways", "payments.legacy"),
        *("payments.sendings", "payments.brake", "payments.hints"),
    ),
    ("payments.commands", "payments.queries", "payments.projections", "payments.callbacks"),
    ("payments.fulfilment", "payments.health"),
    ("payments.service",),
    ("payments.cli", "web"),
    ("payments.__main__",),
)
ENTRIES = {entry: level for level, entries in enumerate(LAYERS) for entry in entries}
MAP = "payments"  # src/payments/__init__.py: a docstring and no code


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that is imported anywhere in the file, in functions and for types as well."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def entry_of(module: str) -> str:
    found = [entry for entry in ENTRIES if module == entry or module.startswith(f"{entry}.")]
    assert found, f"{module} stands in no layer"
    return max(found, key=len)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name.split(".")[0] in ("payments", "web")}


def test_there_is_something_to_look_at() -> None:
    assert {"payments.payment.state", "payments.events.facts", "web.app"} <= set(MODULES)
    assert own_imports("web.auth") == {"payments.clients", "payments.errors"}
    assert "payments.embedded_postgres" in own_imports("payments.opening")


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module in set(MODULES) - {MAP}
        for imported in own_imports(module)
        if (there := entry_of(imported)) != (here := entry_of(module))
        and ENTRIES[there] >= ENTRIES[here]
    ]
    assert wrong == []


def test_the_layers_are_those_of_the_map() -> None:
    """The order that src/payments/__init__.py states, from the top to the bottom."""
    docstring = ast.get_docstring(parse(MODULES[MAP]))
    assert docstring is not None
    order = docstring[docstring.index("web, cli > ") :]
    stated = [re.findall(r"[a-z_.]+", part) for part in order.split(">")]
    levels = [
        [ENTRIES[name if name == "web" else f"payments.{name}"] for name in names]
        for names in stated
    ]
    for upper, lower in pairwise(levels):
        assert min(upper) > max(lower), order


def test_the_map_holds_no_code() -> None:
    (only,) = parse(MODULES[MAP]).body
    assert isinstance(only, ast.Expr)


def test_payments_never_imports_web() -> None:
    assert {module.split(".")[0] for module in importers_of("web")} == {"web"}


@pytest.mark.parametrize(
    ("side", "other"),
    [("payments.commands", "payments.queries"), ("payments.queries", "payments.commands")],
)
def test_commands_and_queries_never_import_each_other(side: str, other: str) -> None:
    modules = [module for module in MODULES if module.startswith(f"{side}.")]
    assert modules
    for module in modules:
        assert not [name for name in own_imports(module) if name.startswith(other)], module


def importers_of(package: str) -> set[str]:
    return {
        module
        for module, path in MODULES.items()
        if package in {name.split(".")[0] for name in imports(path)}
    }


def test_there_is_one_http_client_for_money_and_one_for_callbacks() -> None:
    """Only plain httpx tells a request that was never sent from one whose outcome is unknown."""
    assert importers_of("aiohttp") == {"payments.order_service.endpoint"}
    assert importers_of("httpx") == {"payments.order_service.endpoint", "payments.gateways.http"}


def test_the_client_for_callbacks_is_imported_where_it_is_used() -> None:
    """It takes a third of the time in which a command starts."""
    importers = {
        name
        for name, path in MODULES.items()
        for node in parse(path).body
        if isinstance(node, ast.ImportFrom) and node.module == "payments.order_service.endpoint"
    }
    assert importers == set()


def test_an_address_is_parsed_where_it_comes_from_and_nowhere_else() -> None:
    """From the settings, or from who writes a gateway."""
    parser = "payments.http_url"
    others = re.compile(r"\b(urlsplit|urlparse|URL)\(")
    found = {name for name, path in MODULES.items() if others.search(path.read_text("utf-8"))}
    assert found == set()
    calling = re.compile(r"\bparse_http_url\b")
    callers = {name for name, path in MODULES.items() if calling.search(path.read_text("utf-8"))}
    assert callers - {parser} == {
        *("payments.settings", "payments.setting_values", "payments.gateways.http"),
    }


def test_every_connection_to_the_database_is_opened_in_one_place() -> None:
    """There its session is set up."""
    opening = re.compile(r"\b(psycopg|Connection|_Connection)\.connect\(|\bConnectionPool\(")
    found = {name for name, path in MODULES.items() if opening.search(path.read_text("utf-8"))}
    assert found == {"payments.database.connections"}
    assert importers_of("psycopg_pool") == {"payments.database.connections"}


def test_the_service_does_not_read_with_the_librarys_classes() -> None:
    """They are for other teams, and their connections are not set up as ours are."""
    assert importers_of("eventsourcing") == {
        *("payments.events.library", "payments.events.store", "payments.events.watch"),
        *(
            "payments.event_store",
            "payments.events.appender",
            "payments.commands.charge",
            "payments.commands.outcomes",
        ),
        *("payments.commands.importing", "payments.commands.refund"),
    }
    for module in set(MODULES) - {"payments.events.library"}:
        found = {name for name in imports(MODULES[module]) if name.startswith("eventsourcing")}
        assert found <= {"eventsourcing.persistence"}, module
        assert "payments.events.library" not in imports(MODULES[module]), module


def test_statements_on_the_log_are_where_the_store_says() -> None:
    """Other files than its own."""
    docstring = ast.get_docstring(parse(MODULES["payments.events.store"])) or ""
    said = {SRC / "payments" / file for file in re.findall(r"\w+/\w+\.py", docstring)}
    reading = re.compile(r"\b(FROM|JOIN) payment_events\b")
    found = {path for path in MODULES.values() if reading.search(path.read_text("utf-8"))}
    assert found - {MODULES["payments.events.store"]} == said


def test_who_does_not_trace_needs_no_opentelemetry() -> None:
    assert importers_of("opentelemetry") == {"payments.observability.tracing"}


def test_the_embedded_servers_python_package_is_not_imported() -> None:
    """Its get_server() leaves servers behind; only its binaries are used."""
    assert importers_of("embedded_postgres") == set()


def test_the_aggregate_knows_no_clock_and_no_io() -> None:
    pure = {
        "collections",
        "datetime",
        "decimal",
        "enum",
        "functools",
        "hashlib",
        "itertools",
        "re",
        "typing",
    }
    allowed = pure | {"msgspec", "payments", "uuid"}
    for module in ("payments.payment.state", "payments.events.facts", "payments.money"):
        assert {name.split(".")[0] for name in imports(MODULES[module])} <= allowed
        source = MODULES[module].read_text(encoding="utf-8")
        assert not re.search(r"\b(now|utcnow|today|uuid1|uuid4)\(", source)


def test_no_module_and_no_function_is_too_long() -> None:
    found = {}
    for module, path in MODULES.items():
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES_MAX:
            found[module] = lines
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    found[f"{module}.{node.name}"] = lines
    assert found == {}


def test_no_two_classes_have_the_same_name() -> None:
    """A name found by searching is then the only class it can mean."""
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_every_package_has_a_map_of_its_modules() -> None:
    """Its docstring names each of them, as `name.py` or `name/`, and none that is not there."""
    wrong = []
    for package, path in MODULES.items():
        if path.name != "__init__.py":
            continue
        named = {
            module or folder
            for module, folder in re.findall(
                r"(?<![\w/])(?:(\w+)\.py\b|(\w+)/(?!\w))", ast.get_docstring(parse(path)) or ""
            )
        }
        there = {
            name.rpartition(".")[2]
            for name in MODULES
            if name.rpartition(".")[0] == package and not name.endswith("__main__")
        }
        wrong += [f"{package} does not name {name}" for name in sorted(there - named)]
        wrong += [f"{package} names {name}" for name in sorted(named - there)]
    assert wrong == []


def prose(path: Path) -> str:
    """The docstrings and comments of a file."""
    source = path.read_text(encoding="utf-8")
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        ast.get_docstring(node) or ""
        for node in ast.walk(parse(path))
        if isinstance(node, documented)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(found)


def names_in(body: list[ast.stmt]) -> set[str]:
    """What a module or class defines."""
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
    return found


def attributes_of(node: ast.ClassDef) -> set[str]:
    """What its methods assign to `self`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
    }


def defined_names() -> dict[str, set[str]]:
    """What each module defines, by the last part of its name, and each class, by its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        parent, _, name = module.rpartition(".")
        found[name] |= names_in(parse(path).body)
        found[parent.rpartition(".")[2]].add(name)
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.bases:
                found[node.name] |= names_in(node.body) | attributes_of(node)
    return found


def test_what_a_docstring_or_comment_cites_is_there() -> None:
    """Files, `module.name` and `Class.name` of ours."""
    defined = defined_names()
    wrong = []
    for module, path in MODULES.items():
        text = prose(path)
        near = [*path.parents][: len(path.relative_to(ROOT).parts)]
        wrong += [
            f"{module}: {file}"
            for file in re.findall(r"(?<![\w/.*-])[\w./-]*\w\.(?:py|sql|md|yml)\b", text)
            if not any((folder / file).exists() for folder in near)
        ]
        wrong += [
            f"{module}: {name}.{attribute}"
            for name, attribute in re.findall(r"(?<![\w./-])([A-Za-z_]+)\.([A-Za-z_]\w*)", text)
            if name in defined and attribute not in defined[name] | SUFFIXES
        ]
    assert wrong == []


def test_a_database_function_is_cited_where_it_is_defined_last() -> None:
    """As `function in migrations/0001` or `function (migrations/0001)`."""
    last: dict[str, str] = {}
    for path in sorted((SRC / "payments/migrations").glob("*.sql")):
        for name in re.findall(r"\bFUNCTION (\w+)\(", path.read_text(encoding="utf-8")):
            last[name] = path.name[:4]
    cited = [
        (path.name, *found)
        for path in MODULES.values()
        for found in re.findall(r"(\w+),?\s+(?:is in|in|\()\s*migrations/(\d{4})", prose(path))
    ]
    named = {name for _, name, _ in cited}
    assert {"append_payment_events", "claim_deliveries", "paid_orders"} <= named
    assert [each for each in cited if last.get(each[1], each[2]) != each[2]] == []


def test_every_dependency_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (requirement for group in groups for requirement in group):
        lines = [line for line in text.splitlines() if f'"{requirement}",' in line]
        assert lines, requirement
        for line in lines:
            assert re.search(r'", +# \w', line), f"no comment: {requirement}"


# On one line, or in brackets over several. Found in the text: walking all trees takes seconds.
_OF_A_TEST_MODULE = re.compile(
    r"^\s*(?:from|import)\s+tests\b(?:[^\n(]*\btest_|[^\n(]*\([^)]*\btest_)", re.MULTILINE
)


def test_no_test_module_is_imported_by_another() -> None:
    """Then its tests could not be changed alone: what several need is in a module beside them."""
    wrong = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for found in _OF_A_TEST_MODULE.finditer(path.read_text())
    ]
    assert wrong == []
