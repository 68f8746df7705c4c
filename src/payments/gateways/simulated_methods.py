"""What a request's `payment_method` has the simulated provider play: docs/simulated-gateway.md.

Pure. A charge in steps is told by what it was begun with and for how long it has run, so nothing
but its beginning is kept.
"""

import re
from typing import Literal, NamedTuple

ACTION_S = 5.0  # after that long the customer has acted
PREFIX = "sim_"

# What is begun at the provider before it captures.
PREPARED = ("action", "action_declined", "action_never", "authorized", "prepare")
FAULTS = ("down", "timeout", "answer_lost", "delay")
METHODS = (
    "sim_decline, sim_refuse, sim_down, sim_timeout, sim_answer_lost, sim_delay_N, sim_action, "
    "sim_action_declined, sim_action_never, sim_authorized, sim_prepare, sim_pending_N, "
    "sim_pending_declined_N, sim_late_capture_N (N seconds) or sim_ref_X"
)
STEPS = (*PREPARED, "pending", "pending_declined", "late_capture")

_METHOD = re.compile(
    r"sim_(?:(?P<plain>decline|refuse|down|timeout|answer_lost|action|action_declined"
    r"|action_never|authorized|prepare)"
    r"|(?P<timed>delay|pending|pending_declined|late_capture)_(?P<seconds>[0-9]{1,5})"
    r"|(?P<ref>ref)_(?P<reference>[A-Za-z0-9_-]{1,64}))"
)


class Method(NamedTuple):
    """`seconds` is what its name ends with; `reference` likewise."""

    kind: str
    seconds: float = 0.0
    reference: str | None = None


class UnknownMethod(Exception):
    """It begins like one of these and is none."""


def parse_method(payment_method: str | None) -> Method | None:
    """None for any other token; raises UnknownMethod."""
    if payment_method is None or not payment_method.startswith(PREFIX):
        return None
    if not (match := _METHOD.fullmatch(payment_method)):
        raise UnknownMethod
    if match["ref"]:
        return Method("ref", reference=match["reference"])
    if match["timed"]:
        return Method(match["timed"], float(match["seconds"]))
    return Method(match["plain"])


Stage = Literal["unknown", "ready", "action", "authorized", "processing", "approved", "declined"]


def stage(method: Method, age_s: float) -> Stage:
    """Where a charge stands that was begun so long ago, unless it was decided since. `approved` and
    `declined` are decided by whoever looks."""
    match method.kind:
        case "prepare":
            return "ready"
        case "action_never":
            return "action"
        case "action" | "authorized" | "action_declined" if age_s < ACTION_S:
            return "action"
        case "action":
            return "ready"
        case "authorized":
            return "authorized"
        case "action_declined":
            return "declined"
        case "pending" | "pending_declined" if age_s < method.seconds:
            return "processing"
        case "pending":
            return "approved"
        case "pending_declined":
            return "declined"
        case "late_capture":
            return "unknown" if age_s < method.seconds else "approved"
    raise AssertionError(method)
