"""The settings: one frozen Struct, whose fields define each variable."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import msgspec

from payments.clients import ApiKey, parse_api_keys
from payments.http_url import HttpUrl, parse_http_url
from payments.setting_values import (
    CurrencyGateway,
    Network,
    one_of,
    parse_directory,
    parse_gateway,
    parse_gateway_by_currency,
    parse_gateways,
    parse_host,
    parse_hosts,
    parse_line,
    parse_names,
    parse_networks,
    parse_order_status_url,
    parse_return_url_prefixes,
    parse_statuses,
    parse_text,
    parse_word,
    parse_words,
    parse_yes_no,
    seconds,
    whole,
)
from payments.webhook_secrets import parse_secrets

# The time limit of a request until its intent is durable, reads and appends included: with Postgres
# down or frozen each gets its response in under 3 s.
INTENT_PATIENCE_S = 2.5
# The seats must be held for longer than a provider call by this: clocks differ, and a gateway may
# exceed its timeout.
HOLD_MARGIN_S = 5.0


class Variable(NamedTuple):
    """The parser and description of an environment variable. Its field in Settings has its name in
    lower case."""

    parse: Callable[[str], Any]  # raises ValueError
    meaning: str
    secret: bool = False
    default: str | None = None  # in words, if the field's default does not show it
    may_be_empty: bool = False  # other variables that are empty count as unset


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """In the order of `payments settings`. Names ending in _s are seconds."""

    database_host: Annotated[
        str | None, Variable(parse_hosts, "Postgres host; unset: the embedded Postgres")
    ] = None
    database_port: Annotated[int, Variable(whole(1, 65535), "Postgres port")] = 5432
    database_username: Annotated[str, Variable(parse_text, "Postgres user")] = "postgres"
    database_password: Annotated[
        str | None, Variable(parse_line, "Postgres password", default="none", secret=True)
    ] = None
    database_name: Annotated[str, Variable(parse_text, "Postgres database")] = "paymentdb"
    port: Annotated[int, Variable(whole(1, 65535), "port of the service")] = 4004
    host: Annotated[str, Variable(parse_host, "address the service listens on")] = "127.0.0.1"
    metrics_port: Annotated[
        int | None,
        Variable(
            whole(1, 65535),
            "separate port for /metrics and /health; the only port that `payments work` opens",
        ),
    ] = None
    order_callback_url: Annotated[
        HttpUrl | None,
        Variable(parse_http_url, "URL of Order Service for callbacks; unset: none are sent"),
    ] = None
    order_callback_secret: Annotated[
        tuple[bytes, ...],
        Variable(
            parse_secrets,
            "secrets that sign callbacks: whsec_ and base64, separated by commas; one "
            "signature for each, in this order",
            secret=True,
        ),
    ] = ()
    order_callback_statuses: Annotated[
        tuple[str, ...],
        Variable(
            parse_statuses,
            "outcomes that are sent as callbacks: some of SUCCESS, FAILED, REFUNDED, "
            "ACTION_REQUIRED, separated by commas",
        ),
    ] = ("SUCCESS", "FAILED")
    callback_timeout_s: Annotated[
        float,
        Variable(
            seconds(0.1, 120),
            "timeout of a callback, and the shortest pause before its retry if the "
            "result is unknown",
        ),
    ] = 25
    http_callback_networks: Annotated[
        tuple[Network, ...],
        Variable(
            parse_networks,
            "networks (CIDRs, separated by commas) that plain http may go to, besides "
            "loopback and private ones",
        ),
    ] = ()
    order_status_url: Annotated[
        HttpUrl | None,
        Variable(
            parse_order_status_url,
            "URL of an order's status at Order Service, with {order_id} in it: "
            "docs/order-service.md",
        ),
    ] = None
    unfulfilled: Annotated[
        str,
        Variable(
            one_of("report", "refund"),
            "a payment whose order failed: report it, or report and refund it",
        ),
    ] = "report"
    payments_data_dir: Annotated[
        Path | None,
        Variable(
            parse_directory,
            "embedded database (in a subdirectory), simulated ledger, newest seal of the log",
            default="the user's data home",
        ),
    ] = None
    payments_api_keys: Annotated[
        tuple[ApiKey, ...],
        Variable(
            parse_api_keys,
            "API clients as name:sha256hex, separated by commas; unset: no API key is required",
            secret=True,
        ),
    ] = ()
    charge_deadline_s: Annotated[
        float, Variable(seconds(0.1, 60), "deadline for the response to a charge or refund")
    ] = 7
    gateway_timeout_s: Annotated[
        float,
        Variable(
            seconds(0.05, 60), "timeout of one provider call; must be below CHARGE_DEADLINE_S"
        ),
    ] = 6
    pending_abandon_after_s: Annotated[
        float,
        Variable(
            seconds(1, 604_800),
            "age at which a PENDING payment that the provider does not know is abandoned (FAILED)",
        ),
    ] = 600
    second_charge: Annotated[
        str,
        Variable(
            one_of("allow", "refuse"),
            "a charge with a new key for an order that is already paid: allow it, or "
            "refuse it with 409",
        ),
    ] = "allow"
    seat_hold_s: Annotated[
        float | None,
        Variable(
            seconds(1, 604_800),
            "hold of a charge without hold_until, from its start; no capture is sent after it",
        ),
    ] = None
    intent_queue_max: Annotated[
        int,
        Variable(
            whole(1, 5_000), "limit of concurrent requests; further requests are rejected with 503"
        ),
    ] = 512
    gateway_concurrency_max: Annotated[
        int, Variable(whole(1, 100_000), "limit of concurrent charges and refunds at the provider")
    ] = 1000
    database_pool_max: Annotated[
        int, Variable(whole(1, 100), "database connections for reading")
    ] = 8
    gateways: Annotated[
        tuple[str, ...],
        Variable(
            parse_gateways,
            "the payment providers, with commas; new payments go to the first: stripe, razorpay, "
            "paypal, simulated, simulated-NAME, or package.module:factory: docs/gateways.md",
        ),
    ] = ("simulated",)
    gateway: Annotated[str | None, Variable(parse_gateway, "the same, for a single provider")] = (
        None
    )
    gateway_by_currency: Annotated[
        tuple[CurrencyGateway, ...],
        Variable(
            parse_gateway_by_currency,
            "currencies whose new payments go to another provider, as USD:name, with commas",
        ),
    ] = ()
    return_url_prefixes: Annotated[
        tuple[str, ...],
        Variable(
            parse_return_url_prefixes,
            "what a charge's return_url must begin with: https:// addresses with a path, with "
            "commas",
        ),
    ] = ()
    stripe_secret_key: Annotated[
        str | None,
        Variable(parse_word, "Stripe: secret or restricted API key", default="none", secret=True),
    ] = None
    stripe_publishable_key: Annotated[
        str | None,
        Variable(parse_word, "Stripe: publishable API key; clients get it with next_action"),
    ] = None
    stripe_webhook_secrets: Annotated[
        tuple[str, ...],
        Variable(
            parse_words,
            "Stripe: signing secrets of the webhook endpoint, with commas while one is replaced",
            secret=True,
        ),
    ] = ()
    stripe_payment_method_types: Annotated[
        tuple[str, ...],
        Variable(parse_names, "Stripe: kinds of payment methods to accept, with commas"),
    ] = ("card",)
    stripe_api_base: Annotated[HttpUrl, Variable(parse_http_url, "Stripe: address of the API")] = (
        parse_http_url("https://api.stripe.com")
    )
    razorpay_key_id: Annotated[str | None, Variable(parse_word, "Razorpay: id of the API key")] = (
        None
    )
    razorpay_key_secret: Annotated[
        str | None,
        Variable(parse_word, "Razorpay: secret of the API key", default="none", secret=True),
    ] = None
    razorpay_webhook_secrets: Annotated[
        tuple[str, ...],
        Variable(
            parse_words,
            "Razorpay: secrets of the webhook, with commas while one is replaced",
            secret=True,
        ),
    ] = ()
    razorpay_api_base: Annotated[
        HttpUrl, Variable(parse_http_url, "Razorpay: address of the API")
    ] = parse_http_url("https://api.razorpay.com")
    paypal_client_id: Annotated[
        str | None, Variable(parse_word, "PayPal: client ID of the REST app")
    ] = None
    paypal_client_secret: Annotated[
        str | None,
        Variable(parse_word, "PayPal: secret of the REST app", default="none", secret=True),
    ] = None
    paypal_webhook_id: Annotated[
        str | None, Variable(parse_word, "PayPal: id of the webhook, with which it is verified")
    ] = None
    paypal_environment: Annotated[
        str, Variable(one_of("sandbox", "live"), "PayPal: which of its environments is meant")
    ] = "live"
    paypal_api_base: Annotated[
        HttpUrl | None,
        Variable(parse_http_url, "PayPal: address of the API", default="by PAYPAL_ENVIRONMENT"),
    ] = None
    simulated_ledger: Annotated[
        str | None,
        Variable(
            parse_text,
            "file of the simulated provider; empty: in memory, lost at exit",
            default="in PAYMENTS_DATA_DIR",
            may_be_empty=True,
        ),
    ] = None
    simulated_faults: Annotated[
        str,
        Variable(
            parse_text,
            "faults of the simulated provider, e.g. delay=0.5,answer_lost*1: "
            "docs/simulated-gateway.md",
            default="none",
        ),
    ] = ""
    migrate_on_start: Annotated[
        bool,
        Variable(parse_yes_no, "migrate the database at startup; false: run `payments migrate`"),
    ] = True
    log_format: Annotated[
        str, Variable(one_of("auto", "json", "text"), "json, text, or auto: text on a terminal")
    ] = "auto"
    log_level: Annotated[
        str,
        Variable(
            one_of("DEBUG", "INFO", "WARNING", "ERROR", upper=True),
            "least severe level that is logged: DEBUG, INFO, WARNING or ERROR",
        ),
    ] = "INFO"
    access_log_per_s: Annotated[
        int,
        Variable(
            whole(0, 1_000_000),
            "requests logged per second; further ones are counted; rejected and failed "
            "requests are always logged",
        ),
    ] = 100
    callback_retention_days: Annotated[
        int, Variable(whole(1, 36_500), "days for which finished callbacks are kept")
    ] = 90

    @property
    def hold_needed_s(self) -> float:
        """The minimum hold time that is left when a charge arrives; with less it cannot begin."""
        return INTENT_PATIENCE_S + self.gateway_timeout_s + HOLD_MARGIN_S

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value, _, _ in describe(self))
        return f"Settings({shown})"


def _variables() -> Iterator[tuple[str, Variable]]:
    for field in msgspec.structs.fields(Settings):
        _, variable = get_args(field.type)
        yield field.name.upper(), variable


VARIABLES = dict(_variables())  # by name, in the order of the fields
_DEFAULTS = Settings()


def describe(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """(variable, value, default, meaning) of each setting; of secrets only whether they are set."""
    for name, variable in VARIABLES.items():
        value, default = (getattr(each, name.lower()) for each in (settings, _DEFAULTS))
        default_shown = variable.default or _shown(default)
        if value == default:
            shown = default_shown
        else:
            shown = "(set, hidden)" if variable.secret else _shown(value)
        yield name, shown, default_shown, variable.meaning


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
