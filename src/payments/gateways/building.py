"""The providers that the settings name, built."""

import importlib
from pathlib import Path
from typing import Literal

from payments.errors import StartError, told
from payments.gateways import Gateway
from payments.gateways.chosen import Gateways
from payments.gateways.ledger_file import LOCK_WAIT_S
from payments.gateways.simulated import SimulatedGateway
from payments.opening import data_dir
from payments.setting_values import BUILT_IN_GATEWAYS, GATEWAY_NAME
from payments.settings import Settings

BUILT_IN = {name: f"payments.gateways.{name}:build" for name in BUILT_IN_GATEWAYS}
SIMULATED = "simulated"
EARLIER_LEDGER_NAME = "simulated-ledger.jsonl"  # in PAYMENTS_DATA_DIR
GATEWAY_MEMBERS = (
    *("name", "knows_our_id", "charge_retry_s", "refund_retry_s", "late_capture_s"),
    *("declines_may_turn_s", "refuses", "reference", "needs_preparing", "account", "prepare"),
    *("charge", "find_charge", "cancel", "refund", "find_refund", "close"),
)


def build_gateways(settings: Settings, *, to: Literal["call", "look"] = "call") -> list[Gateway]:
    """The providers that GATEWAYS names, the default one first; StartError if one or its settings
    do not fit, or GATEWAY_BY_CURRENCY.

    To "look" at what they say of themselves, simulated ones do without their ledgers.
    """
    built = [_build(settings, named, to) for named in settings.gateways]
    Gateways(built, dict(settings.gateway_by_currency))  # before a database is opened
    return built


def _build(settings: Settings, named: str, to: Literal["call", "look"]) -> Gateway:
    if ":" in named or named in BUILT_IN:
        return _plugged_in_gateway(settings, BUILT_IN.get(named, named))
    if settings.simulated_ledger == "" or to == "look":
        return SimulatedGateway(None, settings.simulated_faults, name=named)
    # It must not wait for its ledger for longer than it is waited for: behind what waits already.
    lock_wait_s = min(LOCK_WAIT_S, settings.gateway_timeout_s / 2)
    first = named == SIMULATED
    if settings.simulated_ledger is not None:
        given = Path(settings.simulated_ledger)
        ledger, earlier = given if first else given.with_name(f"{given.name}-{named}"), None
    else:
        directory = data_dir(settings)
        ledger = directory / f"{named}-ledger.sqlite"
        earlier = directory / EARLIER_LEDGER_NAME if first else None
    return SimulatedGateway(
        ledger,
        settings.simulated_faults,
        name=named,
        earlier=earlier,
        lock_wait_s=lock_wait_s,
    )


def _plugged_in_gateway(settings: Settings, spec: str) -> Gateway:
    """Whatever is wrong with somebody else's module is told in one line."""
    module, _, factory = spec.partition(":")
    named = f"GATEWAYS: {spec!r}"
    try:
        build = getattr(importlib.import_module(module), factory)
    except Exception as error:
        raise StartError(f"{named} cannot be imported: {told(error)}") from error
    try:
        gateway: Gateway = build(settings)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{named} failed: {told(error)}") from error
    missing = [name for name in GATEWAY_MEMBERS if not hasattr(gateway, name)]
    if missing:
        raise StartError(f"{named} returned no gateway: it lacks {', '.join(missing)}")
    # It is in events, SQL and metrics, and typed by operators.
    if not isinstance(gateway.name, str) or not GATEWAY_NAME.fullmatch(gateway.name):
        raise StartError(
            f"{named} returned a gateway whose name is not 1 to 64 letters, digits and ._-"
        )
    return gateway
