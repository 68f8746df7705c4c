"""The settings: environment variables, read once into one frozen Struct.

A wrong value raises StartError with one line that names the variable. A variable marked secret can
also be given as a file, by the variable's name with _FILE behind it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from payments.clients import ApiKey, parse_api_keys
from payments.errors import StartError
from payments.webhook_secrets import parse_secrets

# How long a request may take, reads and appends together, until its intent is durable: design,
# "with Postgres down or frozen each request is answered in under 3 s".
INTENT_PATIENCE_S = 2.5
# How much longer than a call of the provider its seats must be held: clocks differ, and a gateway
# may overrun its timeout.
HOLD_MARGIN_S = 5.0
CALLBACK_STATUSES = ("SUCCESS", "FAILED", "REFUNDED")
ORDER_ID = "{order_id}"  # what ORDER_STATUS_URL has in the place of an order's id


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """See VARIABLES for the meaning of each. Names ending in _s are seconds."""

    database_host: str | None = None
    database_port: int = 5432
    database_username: str = "postgres"
    database_password: str | None = None
    database_name: str = "paymentdb"
    port: int = 4004
    host: str = "127.0.0.1"
    metrics_port: int | None = None
    order_callback_url: str | None = None
    order_callback_secret: tuple[bytes, ...] = ()
    order_callback_statuses: tuple[str, ...] = ("SUCCESS", "FAILED")
    callback_timeout_s: float = 25
    http_callback_networks: tuple[str, ...] = ()
    order_status_url: str | None = None
    unfulfilled: str = "report"
    payments_data_dir: Path | None = None
    payments_api_keys: tuple[ApiKey, ...] = ()
    charge_deadline_s: float = 7
    gateway_timeout_s: float = 6
    pending_abandon_after_s: float = 600
    second_charge: str = "allow"
    seat_hold_s: float | None = None
    intent_queue_max: int = 512
    gateway_concurrency_max: int = 1000
    database_pool_max: int = 8
    gateway: str = "simulated"
    simulated_ledger: str | None = None
    simulated_faults: str = ""
    migrate_on_start: bool = True
    log_format: str = "auto"
    log_level: str = "INFO"
    access_log_per_s: int = 100
    callback_retention_days: int = 90

    @property
    def hold_needed_s(self) -> float:
        """For so long seats must still be held when a charge comes, or it cannot begin."""
        return INTENT_PATIENCE_S + self.gateway_timeout_s + HOLD_MARGIN_S

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value, _, _ in describe(self))
        return f"Settings({shown})"


class Variable(NamedTuple):
    """How one environment variable becomes one field of Settings (its name in lower case)."""

    name: str
    parse: Callable[[str], Any]
    default: str
    meaning: str
    secret: bool = False

    @property
    def field(self) -> str:
        return self.name.lower()


def _line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable text")
    return value


def _text(value: str) -> str:
    _line(value)
    # It would be shown, with the password that is often in one.
    if "://" in value or re.search(r"password\s*=", value, re.IGNORECASE):
        raise ValueError("must be neither an address with :// nor a connection string")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value) and not _is_ip_address(value):
        raise ValueError("must be a host name or an IP address, without a port")
    return value


def _hosts(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        is_socket = part.startswith("/") or re.fullmatch(r"@[\w./-]+", part)
        (_text if is_socket else _host)(part)
    return ",".join(parts)


def _is_ip_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def _one_of(*choices: str, upper: bool = False) -> Callable[[str], str]:
    def parse(value: str) -> str:
        value = value.upper() if upper else value
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def _gateway(value: str) -> str:
    if value != "simulated" and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError("must be simulated, or package.module:factory")
    return value


def _yes_no(value: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _callback_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # its text repeats the address, and there may be a password in it
        sound = False
    if not sound or not value.isprintable() or " " in value:
        raise ValueError("must be an http:// or https:// address")
    if "@" in parts.netloc or "#" in value:
        raise ValueError("must hold no user name, password or fragment")
    return value


def _order_status_url(value: str) -> str:
    if value.count(ORDER_ID) != 1:
        raise ValueError(f"must hold {ORDER_ID} once, in its path or query")
    filled = value.replace(ORDER_ID, "0" * 8)
    if ORDER_ID in value.partition("://")[2].partition("/")[0]:
        raise ValueError(f"must hold {ORDER_ID} in its path or query, not in its host")
    _callback_url(filled)
    return value


def _statuses(value: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in value.split(","))
    if not set(chosen) <= set(CALLBACK_STATUSES) or len(set(chosen)) != len(chosen):
        raise ValueError(f"must be some of {', '.join(CALLBACK_STATUSES)}, each once, with commas")
    return chosen


def _networks(value: str) -> tuple[str, ...]:
    try:
        return tuple(str(ipaddress.ip_network(part.strip())) for part in value.split(","))
    except ValueError:
        raise ValueError(
            "must be networks as CIDRs, like 100.64.0.0/10, the bits of the host zero; several are "
            "separated by commas"
        ) from None


VARIABLES = (
    Variable("DATABASE_HOST", _hosts, "unset", "Postgres host; unset: the embedded Postgres"),
    Variable("DATABASE_PORT", _whole(1, 65535), "5432", "Postgres port"),
    Variable("DATABASE_USERNAME", _text, "postgres", "Postgres user"),
    Variable("DATABASE_PASSWORD", _line, "none", "Postgres password", secret=True),
    Variable("DATABASE_NAME", _text, "paymentdb", "Postgres database"),
    Variable("PORT", _whole(1, 65535), "4004", "port of the service"),
    Variable("HOST", _host, "127.0.0.1", "address the service listens on"),
    Variable(
        "METRICS_PORT",
        _whole(1, 65535),
        "unset",
        "a port of their own for /metrics and /health; the only one of `payments work`",
    ),
    Variable("ORDER_CALLBACK_URL", _callback_url, "unset", "where Order Service takes callbacks"),
    Variable(
        "ORDER_CALLBACK_SECRET",
        parse_secrets,
        "unset",
        "signs callbacks: whsec_ and base64; several separated by commas, the first signs first",
        secret=True,
    ),
    Variable(
        "ORDER_CALLBACK_STATUSES",
        _statuses,
        "SUCCESS,FAILED",
        "which outcomes are called back: some of SUCCESS, FAILED, REFUNDED",
    ),
    Variable(
        "CALLBACK_TIMEOUT_S",
        _seconds(0.1, 120),
        "25",
        "Order Service has so long to answer a callback, and as long again before the next try",
    ),
    Variable(
        "HTTP_CALLBACK_NETWORKS",
        _networks,
        "unset",
        "networks (CIDRs, with commas) that plain http may go to, beside loopback and private ones",
    ),
    Variable(
        "ORDER_STATUS_URL",
        _order_status_url,
        "unset",
        "where Order Service tells an order's status, with {order_id} in it: docs/order-service.md",
    ),
    Variable(
        "UNFULFILLED",
        _one_of("report", "refund"),
        "report",
        "what to do about a payment whose order failed: report it, or give it back as well",
    ),
    Variable(
        "PAYMENTS_DATA_DIR",
        lambda value: Path(_text(value)).absolute(),
        "the user's data home",
        "embedded database (in a subdirectory), simulated ledger, newest seal of the log",
    ),
    Variable(
        "PAYMENTS_API_KEYS",
        parse_api_keys,
        "unset",
        "API clients as name:sha256hex, separated by commas; unset: no key is asked for",
        secret=True,
    ),
    Variable(
        "CHARGE_DEADLINE_S", _seconds(0.1, 60), "7", "a charge or refund is answered within this"
    ),
    Variable(
        "GATEWAY_TIMEOUT_S", _seconds(0.05, 60), "6", "the provider's share of it, at the most"
    ),
    Variable(
        "PENDING_ABANDON_AFTER_S",
        _seconds(1, 604_800),
        "600",
        "a PENDING payment unknown to the provider fails after this",
    ),
    Variable(
        "SECOND_CHARGE",
        _one_of("allow", "refuse"),
        "allow",
        "a charge with a new key for an order that is paid: allow it, or refuse it with 409",
    ),
    Variable(
        "SEAT_HOLD_S",
        _seconds(1, 604_800),
        "unset",
        "no capture is sent so long after a charge began, if it names no hold_until itself",
    ),
    Variable(
        "INTENT_QUEUE_MAX",
        _whole(1, 5_000),
        "512",
        "requests that are worked on at once; more are refused with 503",
    ),
    Variable(
        "GATEWAY_CONCURRENCY_MAX",
        _whole(1, 100_000),
        "1000",
        "charges and refunds with the provider at once",
    ),
    Variable("DATABASE_POOL_MAX", _whole(1, 100), "8", "database connections for reading"),
    Variable(
        "GATEWAY",
        _gateway,
        "simulated",
        "the payment provider: simulated, or package.module:factory: docs/gateways.md",
    ),
    Variable(
        "SIMULATED_LEDGER",
        _text,
        "in PAYMENTS_DATA_DIR",
        "file of the simulated provider; empty: in memory, forgotten at exit",
    ),
    Variable(
        "SIMULATED_FAULTS",
        _text,
        "none",
        "faults of the simulated provider, e.g. delay=0.5,answer_lost*1: docs/simulated-gateway.md",
    ),
    Variable("MIGRATE_ON_START", _yes_no, "true", "bring the database up to date at the start"),
    Variable(
        "LOG_FORMAT",
        _one_of("auto", "json", "text"),
        "auto",
        "json, text, or auto: text on a terminal",
    ),
    Variable(
        "LOG_LEVEL",
        _one_of("DEBUG", "INFO", "WARNING", "ERROR", upper=True),
        "INFO",
        "DEBUG, INFO, WARNING or ERROR",
    ),
    Variable(
        "ACCESS_LOG_PER_S",
        _whole(0, 1_000_000),
        "100",
        "requests logged in a second; more are counted, and refusals and errors always logged",
    ),
    Variable(
        "CALLBACK_RETENTION_DAYS", _whole(1, 36_500), "90", "delivered callbacks are kept for this"
    ),
)

# Their empty value means something; any other variable set to nothing counts as not set.
_MAY_BE_EMPTY = {"SIMULATED_LEDGER"}

# What Kubernetes sets in every container for a service called `database` or `metrics`: not meant.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://[0-9A-Fa-f.:\[\]]+:[0-9]+")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; raises StartError for the first wrong variable."""
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        given = _given(variable, environ)
        if given is None or (given == "" and variable.name not in _MAY_BE_EMPTY):
            continue
        try:
            values[variable.field] = variable.parse(given)
        except ValueError as error:  # not with the value: there may be a secret in it
            raise StartError(f"{variable.name}: the value given {error}") from None
    settings = Settings(**values)
    _check_together(settings, values)
    return settings


def _given(variable: Variable, environ: Mapping[str, str]) -> str | None:
    if not variable.secret or not (path := environ.get(f"{variable.name}_FILE")):
        value = environ.get(variable.name, "")
        is_link = variable.name.endswith("_PORT") and _SERVICE_LINK.fullmatch(value)
        return None if is_link else environ.get(variable.name)
    if environ.get(variable.name):
        raise StartError(f"{variable.name} and {variable.name}_FILE are both set; set one of them")
    try:
        value = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        # Not with the path: in its place there may be the secret itself.
        raise StartError(f"{variable.name}_FILE: the file cannot be read: {reason}") from None
    if not value:  # a named and empty file is a mistake, not a wish to do without
        raise StartError(f"{variable.name}_FILE: the file is empty")
    return value


def _check_together(settings: Settings, given: Mapping[str, Any]) -> None:
    """Rules about more than one variable."""
    if settings.database_host is None:
        for name in ("DATABASE_PORT", "DATABASE_USERNAME", "DATABASE_PASSWORD"):
            if name.lower() in given:
                raise StartError(
                    f"{name} is set but DATABASE_HOST is not: set it too, or neither "
                    "to use the embedded Postgres"
                )
    if settings.unfulfilled == "refund" and settings.order_status_url is None:
        raise StartError(
            "UNFULFILLED: refund needs ORDER_STATUS_URL: what a response to a callback says is not "
            "enough to give money back"
        )
    if settings.pending_abandon_after_s < settings.charge_deadline_s:
        raise StartError(
            f"PENDING_ABANDON_AFTER_S: {settings.pending_abandon_after_s:g} must not be less than "
            f"CHARGE_DEADLINE_S ({settings.charge_deadline_s:g})"
        )
    if settings.seat_hold_s is not None and settings.seat_hold_s < settings.hold_needed_s:
        raise StartError(
            f"SEAT_HOLD_S: {settings.seat_hold_s:g} must not be less than "
            f"{settings.hold_needed_s:g}, or no charge could begin"
        )
    if settings.gateway_timeout_s >= settings.charge_deadline_s:
        raise StartError(
            f"GATEWAY_TIMEOUT_S: {settings.gateway_timeout_s:g} must be less than "
            f"CHARGE_DEADLINE_S ({settings.charge_deadline_s:g})"
        )


def describe(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """(variable, value, default, meaning) of each setting; secrets show only that they are set."""
    for variable in VARIABLES:
        value = getattr(settings, variable.field)
        default = Settings.__struct_defaults__[Settings.__struct_fields__.index(variable.field)]
        if value == default:
            shown = variable.default
        elif variable.secret:
            shown = "(set, hidden)"
        elif isinstance(value, bool):
            shown = str(value).lower()
        elif isinstance(value, tuple):
            shown = ",".join(value)
        elif isinstance(value, float):
            shown = f"{value:g}"
        else:
            shown = str(value)
        yield variable.name, shown, variable.default, variable.meaning
