"""Reads the settings from environment variables, and from files for secrets.

A wrong value raises StartError with one line that names the variable. A secret variable can also be
given as a file, whose path is in the variable with the suffix _FILE.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from payments.errors import StartError
from payments.settings import VARIABLES, Settings, Variable

# Set by Kubernetes in every container for a service called `database` or `metrics`: ignored.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://[0-9A-Fa-f.:\[\]]+:[0-9]+")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings of the environment; raises StartError for the first wrong variable."""
    values: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        given = _given(name, variable, environ)
        if given is None or (given == "" and not variable.may_be_empty):
            continue
        try:
            values[name.lower()] = variable.parse(given)
        except ValueError as error:  # without the value, which may be a secret
            raise StartError(f"{name}: the value given {error}") from None
    one = values.get("gateway")
    if one is not None and values.setdefault("gateways", (one,)) != (one,):
        raise StartError("GATEWAY and GATEWAYS name different providers; set one of them")
    settings = Settings(**values)
    _check_together(settings, values)
    return settings


def _given(name: str, variable: Variable, environ: Mapping[str, str]) -> str | None:
    if not variable.secret or not (path := environ.get(f"{name}_FILE")):
        value = environ.get(name, "")
        is_link = name.endswith("_PORT") and _SERVICE_LINK.fullmatch(value)
        return None if is_link else environ.get(name)
    if environ.get(name):
        raise StartError(f"{name} and {name}_FILE are both set; set one of them")
    try:
        value = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        # Without the path, since it may be the secret itself by mistake.
        raise StartError(f"{name}_FILE: the file cannot be read: {reason}") from None
    if not value:  # an empty file is a mistake, not an unset secret
        raise StartError(f"{name}_FILE: the file is empty")
    return value


def _check_together(settings: Settings, given: Mapping[str, Any]) -> None:
    """Checks the rules about several variables."""
    if settings.database_host is None:
        for name in ("DATABASE_PORT", "DATABASE_USERNAME", "DATABASE_PASSWORD"):
            if name.lower() in given:
                raise StartError(
                    f"{name} is set but DATABASE_HOST is not: set both, or neither to use the "
                    "embedded Postgres"
                )
    if settings.unfulfilled == "refund" and settings.order_status_url is None:
        raise StartError(
            "UNFULFILLED: refund needs ORDER_STATUS_URL: the response to a callback is not "
            "sufficient evidence for a refund"
        )
    if settings.pending_abandon_after_s < settings.charge_deadline_s:
        raise StartError(
            f"PENDING_ABANDON_AFTER_S: {settings.pending_abandon_after_s:g} must not be less than "
            f"CHARGE_DEADLINE_S ({settings.charge_deadline_s:g})"
        )
    if settings.seat_hold_s is not None and settings.seat_hold_s < settings.hold_needed_s:
        raise StartError(
            f"SEAT_HOLD_S: {settings.seat_hold_s:g} must not be less than "
            f"{settings.hold_needed_s:g}, or no charge could start"
        )
    if settings.gateway_timeout_s >= settings.charge_deadline_s:
        raise StartError(
            f"GATEWAY_TIMEOUT_S: {settings.gateway_timeout_s:g} must be less than "
            f"CHARGE_DEADLINE_S ({settings.charge_deadline_s:g})"
        )
