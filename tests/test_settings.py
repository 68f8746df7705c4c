"""Each environment variable: its default, good and bad values, and that secrets stay secret."""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from payments.clients import ApiKey
from payments.errors import StartError
from payments.http_url import parse_http_url
from payments.setting_sources import read_settings
from payments.setting_values import CurrencyGateway
from payments.settings import VARIABLES, Settings, describe

CANARY = "canary7391"
DIGEST = "ab" * 32
WEBHOOK_SECRET = "whsec_" + "A" * 32

# The documented names and their defaults, in the words of `payments settings`.
DOCUMENTED = {
    "DATABASE_HOST": "unset",
    "DATABASE_PORT": "5432",
    "DATABASE_USERNAME": "postgres",
    "DATABASE_PASSWORD": "none",
    "DATABASE_NAME": "paymentdb",
    "PORT": "4004",
    "HOST": "127.0.0.1",
    "METRICS_PORT": "unset",
    "ORDER_CALLBACK_URL": "unset",
    "ORDER_CALLBACK_SECRET": "unset",
    "ORDER_CALLBACK_STATUSES": "SUCCESS,FAILED",
    "CALLBACK_TIMEOUT_S": "25",
    "HTTP_CALLBACK_NETWORKS": "unset",
    "ORDER_STATUS_URL": "unset",
    "UNFULFILLED": "report",
    "PAYMENTS_DATA_DIR": "the user's data home",
    "PAYMENTS_API_KEYS": "unset",
    "CHARGE_DEADLINE_S": "7",
    "GATEWAY_TIMEOUT_S": "6",
    "SECOND_CHARGE": "allow",
    "PENDING_ABANDON_AFTER_S": "600",
    "SEAT_HOLD_S": "unset",
    "INTENT_QUEUE_MAX": "512",
    "GATEWAY_CONCURRENCY_MAX": "1000",
    "DATABASE_POOL_MAX": "8",
    "GATEWAYS": "simulated",
    "GATEWAY": "unset",
    "GATEWAY_BY_CURRENCY": "unset",
    "RETURN_URL_PREFIXES": "unset",
    "STRIPE_SECRET_KEY": "none",
    "STRIPE_PUBLISHABLE_KEY": "unset",
    "STRIPE_WEBHOOK_SECRETS": "unset",
    "STRIPE_PAYMENT_METHOD_TYPES": "card",
    "STRIPE_API_BASE": "https://api.stripe.com",
    "RAZORPAY_KEY_ID": "unset",
    "RAZORPAY_KEY_SECRET": "none",
    "RAZORPAY_WEBHOOK_SECRETS": "unset",
    "RAZORPAY_API_BASE": "https://api.razorpay.com",
    "PAYPAL_CLIENT_ID": "unset",
    "PAYPAL_CLIENT_SECRET": "none",
    "PAYPAL_WEBHOOK_ID": "unset",
    "PAYPAL_ENVIRONMENT": "live",
    "PAYPAL_API_BASE": "by PAYPAL_ENVIRONMENT",
    "SIMULATED_LEDGER": "in PAYMENTS_DATA_DIR",
    "SIMULATED_FAULTS": "none",
    "MIGRATE_ON_START": "true",
    "LOG_FORMAT": "auto",
    "LOG_LEVEL": "INFO",
    "ACCESS_LOG_PER_S": "100",
    "CALLBACK_RETENTION_DAYS": "90",
}
SECRETS = {
    *("DATABASE_PASSWORD", "ORDER_CALLBACK_SECRET", "PAYMENTS_API_KEYS"),
    *("STRIPE_SECRET_KEY", "STRIPE_WEBHOOK_SECRETS", "RAZORPAY_KEY_SECRET"),
    *("RAZORPAY_WEBHOOK_SECRETS", "PAYPAL_CLIENT_SECRET"),
}

# What a value needs beside it to be accepted.
BESIDE = {
    "DATABASE_PORT": {"DATABASE_HOST": "db"},
    "DATABASE_USERNAME": {"DATABASE_HOST": "db"},
    "DATABASE_PASSWORD": {"DATABASE_HOST": "db"},
    "GATEWAY_TIMEOUT_S": {"CHARGE_DEADLINE_S": "60"},
    "PENDING_ABANDON_AFTER_S": {"CHARGE_DEADLINE_S": "0.5", "GATEWAY_TIMEOUT_S": "0.1"},
}

GOOD: list[tuple[str, str, Any]] = [
    ("DATABASE_HOST", "db.internal", "db.internal"),
    ("DATABASE_PORT", "1", 1),
    ("DATABASE_PORT", "65535", 65535),
    ("DATABASE_USERNAME", "payments", "payments"),
    ("DATABASE_PASSWORD", CANARY, CANARY),
    ("DATABASE_NAME", "other", "other"),
    ("PORT", "8080", 8080),
    ("HOST", "0.0.0.0", "0.0.0.0"),
    ("HOST", "::", "::"),
    ("DATABASE_HOST", "a,b-1.example.,10.0.0.1", "a,b-1.example.,10.0.0.1"),
    ("DATABASE_HOST", "a, b", "a,b"),
    ("DATABASE_HOST", "fe80::1%eth0", "fe80::1%eth0"),
    ("DATABASE_HOST", "/var/run/postgresql", "/var/run/postgresql"),
    ("DATABASE_HOST", "@abstract", "@abstract"),
    ("DATABASE_USERNAME", "payments@server", "payments@server"),
    ("ORDER_CALLBACK_URL", "http://order:4002/cb", parse_http_url("http://order:4002/cb")),
    ("ORDER_CALLBACK_URL", "https://[::1]/cb?x=1", parse_http_url("https://[::1]/cb?x=1")),
    ("ORDER_CALLBACK_SECRET", WEBHOOK_SECRET, (bytes(24),)),
    (
        "ORDER_CALLBACK_SECRET",
        f"{WEBHOOK_SECRET}, {WEBHOOK_SECRET}",
        (bytes(24), bytes(24)),
    ),
    ("ORDER_CALLBACK_STATUSES", "REFUNDED", ("REFUNDED",)),
    ("ORDER_CALLBACK_STATUSES", "ACTION_REQUIRED", ("ACTION_REQUIRED",)),
    ("CALLBACK_TIMEOUT_S", "0.1", 0.1),
    ("CALLBACK_TIMEOUT_S", "120", 120.0),
    ("HTTP_CALLBACK_NETWORKS", "100.64.0.0/10", (IPv4Network("100.64.0.0/10"),)),
    (
        "HTTP_CALLBACK_NETWORKS",
        "34.118.0.7, 2001:DB8::/32",
        (IPv4Network("34.118.0.7"), IPv6Network("2001:db8::/32")),
    ),
    ("ORDER_CALLBACK_STATUSES", "SUCCESS, FAILED", ("SUCCESS", "FAILED")),
    (
        "ORDER_STATUS_URL",
        "http://orders:4003/v1/{order_id}",
        parse_http_url("http://orders:4003/v1/{order_id}"),
    ),
    (
        "ORDER_STATUS_URL",
        "https://orders/?id={order_id}",
        parse_http_url("https://orders/?id={order_id}"),
    ),
    ("UNFULFILLED", "report", "report"),
    ("PAYMENTS_DATA_DIR", "/srv/payments", Path("/srv/payments")),
    ("PAYMENTS_DATA_DIR", "data", Path.cwd() / "data"),
    ("PAYMENTS_API_KEYS", f"order:{DIGEST}", (ApiKey("order", bytes.fromhex(DIGEST)),)),
    (
        "PAYMENTS_API_KEYS",
        f"order:{DIGEST}, order:{'cd' * 32}",
        (ApiKey("order", bytes.fromhex(DIGEST)), ApiKey("order", bytes.fromhex("cd" * 32))),
    ),
    (
        "PAYMENTS_API_KEYS",
        f"order:{DIGEST},shop:{DIGEST[:-2]}cd",
        (ApiKey("order", bytes.fromhex(DIGEST)), ApiKey("shop", bytes.fromhex(DIGEST[:-2] + "cd"))),
    ),
    ("PAYMENTS_API_KEYS", f"{'x' * 64}:{DIGEST}", (ApiKey("x" * 64, bytes.fromhex(DIGEST)),)),
    ("PAYMENTS_API_KEYS", f"0-_:{DIGEST}", (ApiKey("0-_", bytes.fromhex(DIGEST)),)),
    # It only begins like a name that is the service's own.
    ("PAYMENTS_API_KEYS", f"settling-2:{DIGEST}", (ApiKey("settling-2", bytes.fromhex(DIGEST)),)),
    ("CHARGE_DEADLINE_S", "60", 60.0),
    ("CHARGE_DEADLINE_S", "6.5", 6.5),
    ("GATEWAY_TIMEOUT_S", "0.05", 0.05),
    ("GATEWAY_TIMEOUT_S", "59.9", 59.9),
    ("PENDING_ABANDON_AFTER_S", "1", 1.0),
    ("PENDING_ABANDON_AFTER_S", "604800", 604_800.0),
    ("SECOND_CHARGE", "allow", "allow"),
    ("SECOND_CHARGE", "refuse", "refuse"),
    ("SEAT_HOLD_S", "13.5", 13.5),
    ("SEAT_HOLD_S", "900", 900.0),
    ("SEAT_HOLD_S", "604800", 604_800.0),
    ("INTENT_QUEUE_MAX", "1", 1),
    ("INTENT_QUEUE_MAX", "5000", 5000),
    ("GATEWAY_CONCURRENCY_MAX", "1", 1),
    ("DATABASE_POOL_MAX", "100", 100),
    ("GATEWAY", "simulated", "simulated"),
    ("GATEWAY", "acme.payments:build", "acme.payments:build"),
    ("GATEWAYS", "simulated", ("simulated",)),
    (
        "GATEWAYS",
        "acme.payments:build, simulated-b,simulated-2-x",
        ("acme.payments:build", "simulated-b", "simulated-2-x"),
    ),
    (
        "GATEWAY_BY_CURRENCY",
        "USD:acme, EUR:simulated-b",
        (CurrencyGateway("USD", "acme"), CurrencyGateway("EUR", "simulated-b")),
    ),
    ("RETURN_URL_PREFIXES", "https://shop.example/", ("https://shop.example/",)),
    (
        "RETURN_URL_PREFIXES",
        "https://Shop.Example:443/Paid, https://[::1]:8443/a/",
        ("https://shop.example/Paid", "https://[::1]:8443/a/"),
    ),
    ("GATEWAYS", "razorpay,stripe,paypal", ("razorpay", "stripe", "paypal")),
    ("STRIPE_SECRET_KEY", CANARY, CANARY),
    ("STRIPE_PUBLISHABLE_KEY", "pk_test_1", "pk_test_1"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_1, whsec_2", ("whsec_1", "whsec_2")),
    ("STRIPE_PAYMENT_METHOD_TYPES", "card, sepa_debit", ("card", "sepa_debit")),
    ("STRIPE_API_BASE", "http://127.0.0.1:4010", parse_http_url("http://127.0.0.1:4010")),
    ("RAZORPAY_KEY_ID", "rzp_test_1", "rzp_test_1"),
    ("RAZORPAY_KEY_SECRET", CANARY, CANARY),
    ("RAZORPAY_WEBHOOK_SECRETS", CANARY, (CANARY,)),
    ("RAZORPAY_API_BASE", "https://api.razorpay.com", parse_http_url("https://api.razorpay.com")),
    ("PAYPAL_CLIENT_ID", "AbC-1_2", "AbC-1_2"),
    ("PAYPAL_CLIENT_SECRET", CANARY, CANARY),
    ("PAYPAL_WEBHOOK_ID", "8PT597110X687430LKGECATA", "8PT597110X687430LKGECATA"),
    ("PAYPAL_ENVIRONMENT", "sandbox", "sandbox"),
    ("PAYPAL_API_BASE", "http://127.0.0.1:4011", parse_http_url("http://127.0.0.1:4011")),
    ("SIMULATED_LEDGER", "/srv/ledger.sqlite", "/srv/ledger.sqlite"),
    ("SIMULATED_LEDGER", "", ""),
    ("SIMULATED_FAULTS", "delay=0.5,answer_lost*1", "delay=0.5,answer_lost*1"),
    ("MIGRATE_ON_START", "false", False),
    ("MIGRATE_ON_START", "0", False),
    ("MIGRATE_ON_START", "TRUE", True),
    ("METRICS_PORT", "4005", 4005),
    ("LOG_FORMAT", "json", "json"),
    ("LOG_LEVEL", "debug", "DEBUG"),
    ("ACCESS_LOG_PER_S", "0", 0),
    ("CALLBACK_RETENTION_DAYS", "1", 1),
    ("CALLBACK_RETENTION_DAYS", "36500", 36_500),
]
BAD = [
    ("DATABASE_HOST", "db\nHOST: forged"),
    ("DATABASE_HOST", f"postgres://u:{CANARY}@h/db"),
    ("DATABASE_HOST", f"u:{CANARY}@h"),
    ("DATABASE_HOST", f"@u:{CANARY}@h"),
    ("DATABASE_HOST", f"host=h password={CANARY}"),
    ("DATABASE_HOST", f"/tmp,postgres://u:{CANARY}@h/db"),
    ("DATABASE_HOST", "db:5432"),
    ("DATABASE_HOST", "a,,b"),
    ("DATABASE_PORT", f"postgres://u:{CANARY}@h:5432/db"),
    ("DATABASE_USERNAME", f"postgres://u:{CANARY}@h/db"),
    ("DATABASE_NAME", f"postgres://u:{CANARY}@h/db"),
    ("DATABASE_NAME", f"dbname=x Password = {CANARY}"),
    ("PORT", f"{CANARY}"),
    ("HOST", f"http://u:{CANARY}@h"),
    ("HOST", "127.0.0.1:4004"),
    ("METRICS_PORT", CANARY),
    ("PAYMENTS_DATA_DIR", f"s3://u:{CANARY}@bucket"),
    ("SIMULATED_LEDGER", f"postgres://u:{CANARY}@h/db"),
    ("SIMULATED_FAULTS", f"postgres://u:{CANARY}@h/db"),
    ("GATEWAY", f"https://u:{CANARY}@h"),
    ("CHARGE_DEADLINE_S", CANARY),
    ("INTENT_QUEUE_MAX", CANARY),
    ("LOG_LEVEL", CANARY),
    ("MIGRATE_ON_START", CANARY),
    ("ORDER_CALLBACK_STATUSES", CANARY),
    ("ORDER_STATUS_URL", f"http://u:{CANARY}@orders/{{order_id}}"),
    ("ORDER_STATUS_URL", f"http://orders/{CANARY}"),
    ("ORDER_STATUS_URL", f"http://orders/{CANARY}/{{order_id}}/{{order_id}}"),
    ("ORDER_STATUS_URL", f"http://{{order_id}}/{CANARY}"),
    ("ORDER_STATUS_URL", f"{CANARY}/{{order_id}}"),
    ("UNFULFILLED", CANARY),
    ("DATABASE_PORT", "0"),
    ("DATABASE_PORT", "65536"),
    ("DATABASE_PORT", "-1"),
    ("DATABASE_PORT", "5432.0"),
    ("DATABASE_PORT", "five"),
    ("DATABASE_PORT", " 5432"),
    ("DATABASE_PORT", "5432\n"),
    ("DATABASE_PORT", "٥٤٣٢"),
    ("DATABASE_PORT", "9" * 5000),
    ("DATABASE_USERNAME", "a\x00b"),
    ("DATABASE_PASSWORD", f"{CANARY}\n{CANARY}"),
    ("DATABASE_NAME", "a\x1bb"),
    ("PORT", "0"),
    ("PORT", "1_000"),
    ("HOST", "127.0.0.1\r"),
    ("ORDER_CALLBACK_URL", "order:4002/cb"),
    ("ORDER_CALLBACK_URL", "ftp://order/cb"),
    ("ORDER_CALLBACK_URL", "http://"),
    ("ORDER_CALLBACK_URL", "http:///cb"),
    ("ORDER_CALLBACK_URL", "http://[::1/cb"),
    ("ORDER_CALLBACK_URL", "http://order/cb\nX: y"),
    ("ORDER_CALLBACK_URL", "http://order:99999/cb"),
    ("ORDER_CALLBACK_URL", "http://order:port/cb"),
    ("ORDER_CALLBACK_URL", "http://127.1/cb"),
    ("ORDER_CALLBACK_SECRET", CANARY),
    ("ORDER_CALLBACK_SECRET", f"whsec_{CANARY}"),
    ("ORDER_CALLBACK_SECRET", f"{WEBHOOK_SECRET},"),
    ("ORDER_CALLBACK_SECRET", f"{WEBHOOK_SECRET}\n"),
    ("ORDER_CALLBACK_SECRET", f"{WEBHOOK_SECRET}A"),  # half a byte
    ("ORDER_CALLBACK_STATUSES", "PENDING"),
    ("CALLBACK_TIMEOUT_S", "0"),
    ("CALLBACK_TIMEOUT_S", "121"),
    ("HTTP_CALLBACK_NETWORKS", "100.64.0.1/10"),
    ("HTTP_CALLBACK_NETWORKS", "100.64.0.0/10,"),
    ("HTTP_CALLBACK_NETWORKS", "order-service"),
    ("HTTP_CALLBACK_NETWORKS", "fe80::1%eth0/64"),
    ("ORDER_CALLBACK_STATUSES", "success"),
    ("ORDER_CALLBACK_STATUSES", "SUCCESS,"),
    ("PAYMENTS_DATA_DIR", "a\nb"),
    ("PAYMENTS_API_KEYS", CANARY),
    ("PAYMENTS_API_KEYS", f"order:{CANARY}"),
    ("PAYMENTS_API_KEYS", f"Order:{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"order:{DIGEST.upper()}"),
    ("PAYMENTS_API_KEYS", f":{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"order:{DIGEST},shop:{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"order:{DIGEST},"),
    ("PAYMENTS_API_KEYS", f"{'x' * 65}:{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"default:{DIGEST}"),  # the name for everyone while no keys are asked for
    ("PAYMENTS_API_KEYS", f"fulfilment:{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"settling:{DIGEST}"),  # these three the service uses for itself
    ("PAYMENTS_API_KEYS", f"dispatcher:{DIGEST}"),
    ("PAYMENTS_API_KEYS", f"order:{DIGEST},settling:{'cd' * 32}"),
    ("PAYMENTS_API_KEYS", f"-:{DIGEST}"),  # `payments explain` prints it for nobody
    ("PAYMENTS_API_KEYS", f"-order:{DIGEST}"),
    ("CHARGE_DEADLINE_S", "0"),
    ("CHARGE_DEADLINE_S", "60.1"),
    ("CHARGE_DEADLINE_S", "nan"),
    ("CHARGE_DEADLINE_S", "inf"),
    ("CHARGE_DEADLINE_S", "1e1"),
    ("CHARGE_DEADLINE_S", "7s"),
    ("GATEWAY_TIMEOUT_S", "0.01"),
    ("GATEWAY_TIMEOUT_S", "-6"),
    ("PENDING_ABANDON_AFTER_S", "0.5"),
    ("PENDING_ABANDON_AFTER_S", "604801"),
    ("SECOND_CHARGE", "Refuse"),
    ("SECOND_CHARGE", "deny"),
    ("SEAT_HOLD_S", "0"),
    ("SEAT_HOLD_S", "13.4"),
    ("SEAT_HOLD_S", "604801"),
    ("SEAT_HOLD_S", "15m"),
    ("INTENT_QUEUE_MAX", "0"),
    ("INTENT_QUEUE_MAX", "100001"),
    ("GATEWAY_CONCURRENCY_MAX", "0"),
    ("DATABASE_POOL_MAX", "0"),
    ("DATABASE_POOL_MAX", "101"),
    ("GATEWAY", "stripes"),
    ("GATEWAY", "stripe,paypal"),
    *(
        (name, f"{CANARY} {CANARY}")
        for name in DOCUMENTED
        if name.startswith(("STRIPE_", "RAZORPAY_", "PAYPAL_"))
    ),
    ("STRIPE_SECRET_KEY", f"{CANARY}\n"),
    ("STRIPE_SECRET_KEY", f"https://u:{CANARY}@h"),
    ("STRIPE_WEBHOOK_SECRETS", f"{CANARY},"),
    ("STRIPE_PAYMENT_METHOD_TYPES", "card,card"),
    ("STRIPE_PAYMENT_METHOD_TYPES", "Card"),
    ("PAYPAL_ENVIRONMENT", "production"),
    ("GATEWAY", "simulated,simulated-b"),
    ("GATEWAY", "simulated-"),
    ("GATEWAYS", f"https://u:{CANARY}@h"),
    ("GATEWAYS", "simulated,"),
    ("GATEWAYS", "simulated,simulated"),
    ("GATEWAYS", "simulated-B"),
    ("GATEWAYS", "simulated-../b"),
    ("GATEWAYS", f"simulated-{'b' * 33}"),
    ("GATEWAY_BY_CURRENCY", CANARY),
    ("GATEWAY_BY_CURRENCY", f"{CANARY}:simulated"),
    ("GATEWAY_BY_CURRENCY", f"USD:{CANARY} {CANARY}"),
    ("GATEWAY_BY_CURRENCY", "usd:simulated"),
    ("GATEWAY_BY_CURRENCY", "XAU:simulated"),  # gold, which cannot be charged
    ("GATEWAY_BY_CURRENCY", "USD:"),
    ("GATEWAY_BY_CURRENCY", "USD:simulated,"),
    ("GATEWAY_BY_CURRENCY", "USD:simulated,USD:acme"),
    ("RETURN_URL_PREFIXES", f"https://u:{CANARY}@shop.example/"),
    ("RETURN_URL_PREFIXES", f"http://shop.example/{CANARY}"),
    ("RETURN_URL_PREFIXES", f"https://shop.example/#{CANARY}"),
    ("RETURN_URL_PREFIXES", f"https://shop.example/?a={CANARY}"),
    ("RETURN_URL_PREFIXES", "https://shop.example"),
    ("RETURN_URL_PREFIXES", "https://shop.example?a=/"),
    ("RETURN_URL_PREFIXES", "https://shop.example/a/../b"),
    ("RETURN_URL_PREFIXES", "https://shop.example/,"),
    ("RETURN_URL_PREFIXES", "/paid"),
    ("GATEWAY", "acme:"),
    ("GATEWAY", "acme.payments:build()"),
    ("SIMULATED_LEDGER", "a\nb"),
    ("SIMULATED_FAULTS", "down\n"),
    ("MIGRATE_ON_START", "yes"),
    ("METRICS_PORT", "0"),
    ("LOG_FORMAT", "xml"),
    ("LOG_FORMAT", "JSON"),
    ("LOG_LEVEL", "verbose"),
    ("ACCESS_LOG_PER_S", "-1"),
    ("CALLBACK_RETENTION_DAYS", "0"),
    ("CALLBACK_RETENTION_DAYS", "36501"),
]


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(StartError) as caught:
        read_settings(environ)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def shown(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value, _, _ in describe(read_settings(environ))}


def test_the_variables_and_their_defaults_are_the_documented_ones() -> None:
    assert shown({}) == DOCUMENTED
    assert {name for name, variable in VARIABLES.items() if variable.secret} == SECRETS


def test_a_default_would_be_taken_if_it_were_given() -> None:
    in_words = {"unset", *(variable.default for variable in VARIABLES.values())}
    for name, default in DOCUMENTED.items():
        if default not in in_words:
            assert read_settings({name: default, **BESIDE.get(name, {})}) == read_settings(
                BESIDE.get(name, {})
            )


def test_without_variables_everything_has_its_default() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"PATH": "/bin", "UNRELATED": "1"}) == Settings()


def test_empty_means_unset_except_for_the_ledger() -> None:
    names = [name for name in VARIABLES if name != "SIMULATED_LEDGER"]
    secret_files = [f"{name}_FILE" for name in SECRETS]
    assert read_settings(dict.fromkeys(names + secret_files, "")) == Settings()
    assert read_settings({"SIMULATED_LEDGER": ""}).simulated_ledger == ""


@pytest.mark.parametrize(("name", "given", "expected"), GOOD)
def test_a_good_value_is_taken(name: str, given: str, expected: Any) -> None:
    settings = read_settings({name: given, **BESIDE.get(name, {})})
    assert getattr(settings, name.lower()) == expected
    assert type(getattr(settings, name.lower())) is type(expected)


@pytest.mark.parametrize(("name", "given"), BAD)
def test_a_bad_value_stops_the_start(name: str, given: str) -> None:
    message = refusal({name: given, **BESIDE.get(name, {})})
    assert message.startswith(f"{name}: ")
    assert CANARY not in message


def test_good_and_bad_values_cover_every_variable() -> None:
    assert {name for name, _, _ in GOOD} == set(DOCUMENTED)
    assert {name for name, _ in BAD} == set(DOCUMENTED)


@pytest.mark.parametrize("name", ["DATABASE_PORT", "DATABASE_USERNAME", "DATABASE_PASSWORD"])
def test_a_database_address_needs_a_host(name: str) -> None:
    message = refusal({name: "5432"})
    assert message.startswith(f"{name} ")
    assert "DATABASE_HOST" in message


@pytest.mark.parametrize("name", ["DATABASE_PORT", "METRICS_PORT"])
@pytest.mark.parametrize("link", ["tcp://10.96.0.7:6432", "udp://[fd00::7]:53"])
def test_a_link_of_kubernetes_to_a_service_is_not_meant(name: str, link: str) -> None:
    """It is in the environment of every container beside a service `database` or `metrics`."""
    assert read_settings({name: link}) == Settings()
    assert refusal({name: f"{link}/x", "DATABASE_HOST": "db"}).startswith(f"{name}: ")
    assert refusal({"PORT": link}).startswith("PORT: ")


def test_the_embedded_database_may_be_named() -> None:
    assert read_settings({"DATABASE_NAME": "other"}).database_name == "other"


@pytest.mark.parametrize(
    "environ",
    [
        {"GATEWAY_TIMEOUT_S": "7"},
        {"CHARGE_DEADLINE_S": "6"},
        {"GATEWAY_TIMEOUT_S": "9", "CHARGE_DEADLINE_S": "8"},
    ],
)
def test_the_gateway_gets_less_than_the_deadline(environ: dict[str, str]) -> None:
    message = refusal(environ)
    assert message.startswith("GATEWAY_TIMEOUT_S: ")
    assert "CHARGE_DEADLINE_S" in message


def test_one_provider_by_either_name() -> None:
    assert read_settings({"GATEWAY": "acme:build"}).gateways == ("acme:build",)
    for both in ("acme:build", ""):
        given = {"GATEWAYS": "acme:build", "GATEWAY": both}
        assert read_settings(given).gateways == ("acme:build",)


@pytest.mark.parametrize("gateways", ["simulated", "acme:build,simulated", "simulated,acme:build"])
def test_the_two_names_must_agree(gateways: str) -> None:
    message = refusal({"GATEWAYS": gateways, "GATEWAY": "acme:build"})
    assert message.startswith("GATEWAY and GATEWAYS ")
    assert "acme" not in message


def test_providers_and_currencies_are_shown_as_they_are_given() -> None:
    given = {"GATEWAYS": "simulated,simulated-b", "GATEWAY_BY_CURRENCY": "USD:acme,EUR:simulated-b"}
    assert given.items() <= shown(given).items()


class TestSecretsFromFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("DATABASE_PASSWORD", "pässword"),
            ("ORDER_CALLBACK_SECRET", WEBHOOK_SECRET),
            ("PAYMENTS_API_KEYS", f"order:{DIGEST}"),
        ],
    )
    def test_a_file_holds_the_value(self, tmp_path: Path, name: str, text: str) -> None:
        file = tmp_path / "secret"
        file.write_text(f"{text}\n", encoding="utf-8")
        beside = BESIDE.get(name, {})
        from_file = read_settings({f"{name}_FILE": str(file), **beside})
        assert from_file == read_settings({name: text, **beside})
        # An empty variable is as good as none.
        assert from_file == read_settings({name: "", f"{name}_FILE": str(file), **beside})

    def test_only_secrets_have_files(self, tmp_path: Path) -> None:
        file = tmp_path / "host"
        file.write_text("db")
        assert read_settings({"DATABASE_HOST_FILE": str(file)}) == Settings()

    @pytest.mark.parametrize("name", sorted(SECRETS))
    def test_variable_and_file_together_are_refused(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / "secret"
        file.write_text(CANARY)
        message = refusal({name: CANARY, f"{name}_FILE": str(file)})
        assert message.startswith(f"{name} ")
        assert f"{name}_FILE" in message
        assert CANARY not in message

    @pytest.mark.parametrize("name", sorted(SECRETS))
    def test_a_missing_file_is_refused(self, tmp_path: Path, name: str) -> None:
        message = refusal({f"{name}_FILE": str(tmp_path / "none")})
        assert message.startswith(f"{name}_FILE: ")
        assert "No such file" in message

    def test_a_directory_is_refused(self, tmp_path: Path) -> None:
        message = refusal({"DATABASE_PASSWORD_FILE": str(tmp_path)})
        assert message.startswith("DATABASE_PASSWORD_FILE: ")

    def test_other_bytes_than_utf8_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "secret"
        file.write_bytes(CANARY.encode() + b"\xff")
        message = refusal({"DATABASE_PASSWORD_FILE": str(file), "DATABASE_HOST": "db"})
        assert message.startswith("DATABASE_PASSWORD_FILE: ")
        assert "UTF-8" in message
        assert CANARY not in message

    @pytest.mark.parametrize("name", sorted(SECRETS))
    def test_a_bad_value_in_a_file_is_not_shown(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / "secret"
        file.write_text(f"{CANARY}\n{CANARY}")
        message = refusal({f"{name}_FILE": str(file), "DATABASE_HOST": "db"})
        assert message.startswith(name)
        assert CANARY not in message

    @pytest.mark.parametrize("name", sorted(SECRETS))
    def test_an_empty_file_is_refused(self, tmp_path: Path, name: str) -> None:
        """A secret that was meant to be there and is not must not open the service."""
        file = tmp_path / "secret"
        file.write_text("\n")
        assert refusal({f"{name}_FILE": str(file), "DATABASE_HOST": "db"}).startswith(name)


class TestDescribe:
    @pytest.mark.parametrize(
        ("name", "given", "expected"),
        [
            ("DATABASE_HOST", "db", "db"),
            ("PORT", "8080", "8080"),
            ("CHARGE_DEADLINE_S", "6.5", "6.5"),
            ("CHARGE_DEADLINE_S", "60", "60"),
            ("ORDER_CALLBACK_STATUSES", "SUCCESS, REFUNDED", "SUCCESS,REFUNDED"),
            ("MIGRATE_ON_START", "0", "false"),
            ("ORDER_CALLBACK_URL", "http://Order:80/cb?x", "http://Order:80/cb?x"),
            ("HTTP_CALLBACK_NETWORKS", "34.118.0.7, 10.0.0.0/8", "34.118.0.7/32,10.0.0.0/8"),
            ("PAYMENTS_DATA_DIR", "/srv/payments", "/srv/payments"),
            ("LOG_LEVEL", "debug", "DEBUG"),
        ],
    )
    def test_a_given_value_is_shown(self, name: str, given: str, expected: str) -> None:
        assert shown({name: given})[name] == expected

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("DATABASE_PASSWORD", CANARY),
            ("ORDER_CALLBACK_SECRET", f"whsec_{CANARY}{CANARY}"),
            ("PAYMENTS_API_KEYS", f"{CANARY}:{DIGEST}"),
        ],
    )
    def test_secrets_are_hidden(self, name: str, given: str) -> None:
        environ = {name: given, "DATABASE_HOST": "db"}
        assert shown(environ)[name] == "(set, hidden)"
        assert CANARY not in str(list(describe(read_settings(environ))))


class TestUserinfoOfTheCallbackUrl:
    @pytest.mark.parametrize(
        "given",
        [
            f"http://order:{CANARY}@host:4002/cb",
            f"https://{CANARY}@host/cb?x=1",
            f"http://a@{CANARY}@[::1]:1/cb",
            f"https://@host/cb#{CANARY}",
            f"https://host/cb#{CANARY}",
            "https://host/cb#",
            f"ftp://order:{CANARY}@host/cb",
            f"order:{CANARY}@host/cb",
            f"http://order:{CANARY}@[::1/cb",
            f"http://order:{CANARY}℀@host/cb",
            f"http://order:{CANARY}@/cb",
            f"http://order:{CANARY}@host/cb\n",
        ],
    )
    def test_it_is_refused_without_being_repeated(self, given: str) -> None:
        message = refusal({"ORDER_CALLBACK_URL": given})
        assert message.startswith("ORDER_CALLBACK_URL: ")
        assert CANARY not in message


def test_secrets_do_not_show_in_the_repr() -> None:
    """Settings that end up in a log line or a traceback give nothing away."""
    settings = read_settings(
        {
            "DATABASE_HOST": "db",
            "DATABASE_PASSWORD": CANARY,
            "ORDER_CALLBACK_SECRET": f"whsec_{CANARY}{CANARY}",
        }
    )
    assert CANARY not in repr(settings)


def test_a_secret_in_the_place_of_its_file_is_not_repeated() -> None:
    with pytest.raises(StartError) as refused:
        read_settings({"ORDER_CALLBACK_SECRET_FILE": CANARY})
    assert CANARY not in str(refused.value)
    assert str(refused.value).startswith("ORDER_CALLBACK_SECRET_FILE: the file cannot be read: ")


@pytest.mark.parametrize("password", ["x://y", "my password = 1"])
def test_a_password_may_look_like_anything(password: str) -> None:
    found = read_settings({"DATABASE_HOST": "db", "DATABASE_PASSWORD": password})
    assert found.database_password == password
