"""Requests made up from the OpenAPI document, valid and invalid: answers are what it says.

Some 700 are edge cases of each parameter and field; `--cases` is how many are drawn beside them,
3,000 in the long run. Which requests come is the same each time, but for what answers
before them contain: ids and times.
"""

import json
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.engine import events, from_schema
from schemathesis.generation.meta import TestPhase
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.specs.openapi.checks import positive_data_acceptance

from payments.database.connections import DatabaseAddress
from tests.process import ServiceProcess, at
from web.paths import WEBHOOK

SEED = 20260131
# Each endpoint is asked so often; the tenth has more, and some follow from answers.
CASES_PER_EXAMPLE = 15

# What is true of fields together, or of what was there before, no schema can say.
BEYOND_THE_SCHEMA = {
    ("cursor", "must be the next_cursor of an earlier response, unchanged"),
    ("created_until", "must not be before created_from"),
    (
        "hold_until",
        "must be at least 13.5 s from now, so that the charge can finish before it: extend the "
        "hold, and retry with the same key and the new hold_until",
    ),
    ("return_url", "is not accepted: the service has no RETURN_URL_PREFIXES; leave it out"),
}


def is_as_it_should_be(case: Any, response: Any) -> bool:
    """Whether a request was refused for what the document says in words only."""
    problem = response.json()
    code = problem["code"]
    if code == "idempotency_key_reused":
        return True
    if code == "invalid_idempotency_key":
        without_key = "Idempotency-Key" not in (case.headers or {})
        return case.path == "/v1/refund" and "amount_cents" in case.body and without_key
    errors = {(error["field"], error["message"]) for error in problem.get("errors", ())}
    return bool(errors) and errors <= BEYOND_THE_SCHEMA


numbers = count()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Lets more of the valid requests come to something: a cursor that was made up never does, and
    of several charges with the documented key only one."""
    if case.meta.generation.mode is not schemathesis.GenerationMode.POSITIVE:
        return
    case.query.pop("cursor", None)
    is_edge_case = case.meta.phase.name is TestPhase.COVERAGE
    if is_edge_case and case.path == "/v1/charge" and case.headers["Idempotency-Key"] == "abc123":
        case.headers["Idempotency-Key"] = f"edge-case-{next(numbers)}"


@schemathesis.check
def what_is_valid_is_accepted(context: Any, response: Any, case: Any) -> None:
    try:
        positive_data_acceptance(context, response, case)
    except RejectedPositiveData:
        if not is_as_it_should_be(case, response):
            raise


@pytest.mark.timeout(900)
def test_answers_are_as_the_document_says(
    address: DatabaseAddress, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cases = request.config.getoption("--cases")
    statuses: Counter[tuple[str, int]] = Counter()
    sent: Counter[str] = Counter()
    faults: dict[tuple[str, str], str] = {}
    with ServiceProcess(tmp_path, LOG_FORMAT="json", **at(address)) as service:
        config = schemathesis.Config.from_dict(
            {
                "seed": SEED,
                "checks": {"positive_data_acceptance": {"enabled": False}},
                "generation": {
                    "max-examples": max(1, cases // CASES_PER_EXAMPLE),
                    "database": "none",
                },
            }
        )
        schema = schemathesis.openapi.from_url(f"{service.url}/schema/openapi.json", config=config)
        for event in from_schema(schema).execute():
            assert not isinstance(event, events.NonFatalError | events.FatalError), event
            if not isinstance(event, events.ScenarioFinished):
                continue
            sent[event.phase.value] += len(event.recorder.interactions)
            for case_id, interaction in event.recorder.interactions.items():
                assert interaction.response is not None, "no answer"
                case = event.recorder.cases[case_id].value
                key = f"{case.method} {case.path}"
                statuses[key, interaction.response.status_code] += 1
            for checks in event.recorder.checks.values():
                for check in checks:
                    if check.failure_info is not None:
                        found = check.failure_info
                        text = f"{found.failure.title}: {found.failure.message}"
                        label = event.recorder.label
                        faults[label, check.name] = f"{text}\n{found.code_sample}"
    log = [json.loads(line) for line in service.log.read_text().splitlines()]
    figures = [
        f"{endpoint:34} {status} {count:6}" for (endpoint, status), count in statuses.items()
    ]
    sys.stdout.write("\n".join([f"\n{sent.total()} requests: {dict(sent)}", *sorted(figures), ""]))
    assert not faults, "\n\n".join(f"{key}: {text}" for key, text in faults.items())
    assert not [key for key in statuses if key[1] >= 500]
    assert not [line for line in log if line["level"] in ("ERROR", "CRITICAL")]
    assert sent.total() >= cases * 0.9
    assert all(sent[phase] for phase in ("examples", "coverage", "fuzzing", "stateful"))
    for path, answers in schema.raw_schema["paths"].items():
        if path == WEBHOOK:  # only a provider can sign one, and the simulated one sends none
            continue
        for method, operation in answers.items():
            succeeded = {int(status) for status in operation["responses"] if status < "300"}
            reached = {status for key, status in statuses if key == f"{method.upper()} {path}"}
            assert reached & succeeded, f"{method} {path} never succeeded"
