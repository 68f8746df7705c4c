"""What the service says to people uses the words of docs/glossary.md."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from payments.cli import main
from payments.settings import VARIABLES

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
GLOSSARY = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")

# How the verbs in the glossary's column "instead of" are inflected; its other entries are taken as
# they stand there, with the endings -s, -ed and -ing.
FORMS = {
    "send again": "(send|sends|sent|sending)( \\w+)? again",
    "try again": "(try|tries|tried|trying) again",
    "is told": "(is|are|was|were|be|been) told",
    "is taken": "(is|are|was|were|be|been) taken",
    "is owed": "(is|are|was|were|be|been)? ?owed",
    "goes on": "(go|goes|going|went|gone) on",
    "given up": "(give|gives|giving|gave|given) up",
    "left open": "(leave|leaves|leaving|left) open",
    "look at it": "(look|looks|looked|looking) at",
    "stands": "stands",
    "who": "who",
    "whoever": "whoever",
}

# Where a word of that column is right: the word, a part of the text, and the reason.
ALLOWED = (
    ("head", "head of log", "the newest seal"),
    ("head", "audit head", "the newest seal"),
    ("head", "a head was kept", "the newest seal"),
    ("head", "POSITION:HASH", "the newest seal"),
    ("head", "--head", "the newest seal"),
    ("head", "head {", "the newest seal"),
    ("head", "head: {", "the newest seal"),
    ("gone", "delivered, gone (410)", "a value of `outcome`"),
    ("repeat", "already_processed, repeated (the same", "a value of `said`"),
)

SQL = re.compile(
    r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|SET|FROM|WHERE|VALUES|ORDER BY|COPY|LOCK)\b"
)


def words() -> dict[str, re.Pattern[str]]:
    """A pattern for each entry of the column "instead of" of the glossary's last table."""
    table = GLOSSARY.partition("\n| instead of |")[2].partition("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        cell = re.sub(r"\(.*?\)", "", row.split("|")[1])
        for entry in cell.split(","):
            word = entry.strip()
            pattern = FORMS.get(word, f"{re.escape(word)}(s|ed|ing)?")
            found[word] = re.compile(rf"(?<![\w`-]){pattern}(?!\w)", re.IGNORECASE)
    return found


WORDS = words()


def described(value: object) -> Iterator[str]:
    """The texts for people in an OpenAPI document."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("description", "summary", "title", "detail") and isinstance(item, str):
                yield item
            else:
                yield from described(item)
    elif isinstance(value, list):
        for item in value:
            yield from described(item)


def openapi() -> Iterator[str]:
    """tests/web/test_openapi.py holds the file to what the service serves."""
    yield from described(json.loads((ROOT / "tests/web/openapi.json").read_text("utf-8")))


def helps(command: click.Command = main, parent: click.Context | None = None) -> Iterator[str]:
    context = click.Context(command, parent=parent, info_name=command.name)
    yield " ".join(command.get_help(context).split())
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from helps(child, context)


def meanings() -> Iterator[str]:
    for name, variable in VARIABLES.items():
        yield f"{name}: {variable.meaning}"
        yield f"{name}: {variable.default or ''}"


def docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
        ):
            yield node.body[0].value


def literals(node: ast.AST, leave_out: set[ast.AST]) -> Iterator[str]:
    """The texts of several words in it; placeholders as {}."""
    if node in leave_out:
        return
    if isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and " " in node.value:
            yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from literals(child, leave_out)


def said() -> Iterator[str]:
    """Every text in the code but docstrings and SQL: problems, field errors, log messages, the
    HELP of metrics, what commands print, and why the service does not start."""
    for path in sorted(SRC.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for text in literals(tree, set(docstrings(tree))):
            if not SQL.search(text):
                yield text


SOURCES = (said, openapi, helps, meanings)


def faults(text: str) -> list[str]:
    """The words in it that are not used here."""
    return [
        word
        for word, pattern in WORDS.items()
        if pattern.search(text)
        and not any(allowed == word and part in text for allowed, part, _ in ALLOWED)
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_texts_use_the_words_of_the_glossary(source: Callable[[], Iterator[str]]) -> None:
    texts = list(source())
    assert len(texts) > 30
    assert [(found, text) for text in texts if (found := faults(text))] == []


def test_forms_and_exceptions_are_of_words_in_the_glossary() -> None:
    assert len(WORDS) > 20
    assert {*FORMS, *(word for word, _, _ in ALLOWED)} <= WORDS.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Mend the fields.", ["mend"]),
        ("the provider answered twice", ["answer"]),
        ("Send it again later", ["send again"]),
        ("whoever sends it", ["whoever"]),
        ("callbacks were taken, and none is owed", ["is taken", "is owed"]),
        ("the head of the request", ["head"]),
        ("the head of log 7", []),
        ("answer_lost, client_gone and the header", []),
    ],
)
def test_the_words_are_found_in_all_their_forms(text: str, found: list[str]) -> None:
    assert faults(text) == found
