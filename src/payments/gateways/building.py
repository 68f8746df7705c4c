"""The provider that the settings name, built."""

import importlib
from pathlib import Path
from typing import Literal

from payments.errors import StartError, told
from payments.gateways import Gateway
from payments.gateways.ledger_file import LOCK_WAIT_S
from payments.gateways.simulated import SimulatedGateway
from payments.opening import data_dir
from payments.settings import Settings

LEDGER_NAME = "simulated-ledger.sqlite"  # in PAYMENTS_DATA_DIR
EARLIER_LEDGER_NAME = "simulated-ledger.jsonl"
GATEWAY_MEMBERS = (
    *("name", "safe_retry_s", "late_capture_s"),
    *("charge", "find_charge", "refund", "find_refund", "close"),
)


def build_gateway(settings: Settings, *, to: Literal["call", "look"] = "call") -> Gateway:
    """The provider that GATEWAY names; StartError if it or its settings do not fit.

    To "look" at what it says of itself the simulated one does without its ledger.
    """
    if ":" in settings.gateway:
        return _plugged_in_gateway(settings)
    if settings.simulated_ledger == "" or to == "look":
        return SimulatedGateway(None, settings.simulated_faults)
    # It must not wait for its ledger for longer than it is waited for: behind what waits already.
    lock_wait_s = min(LOCK_WAIT_S, settings.gateway_timeout_s / 2)
    if settings.simulated_ledger is not None:
        ledger, earlier = Path(settings.simulated_ledger), None
    else:
        directory = data_dir(settings)
        ledger, earlier = directory / LEDGER_NAME, directory / EARLIER_LEDGER_NAME
    return SimulatedGateway(
        ledger, settings.simulated_faults, earlier=earlier, lock_wait_s=lock_wait_s
    )


def _plugged_in_gateway(settings: Settings) -> Gateway:
    """Whatever is wrong with somebody else's module is told in one line."""
    module, _, factory = settings.gateway.partition(":")
    named = f"GATEWAY: {settings.gateway!r}"
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
    return gateway
