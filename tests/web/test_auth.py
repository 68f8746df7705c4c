"""Who a request comes from."""

import hashlib

import pytest

from payments.errors import Unauthorized
from payments.settings import DEFAULT_CLIENT, ApiKey
from web.auth import STAFF, authenticate, may_read

Headers = list[tuple[bytes, bytes]]


def key(client: str, secret: bytes) -> ApiKey:
    return ApiKey(client, hashlib.sha256(secret).digest())


KEYS = (
    key("order", b"order-key-1"),
    key("order", b"order-key-2"),
    key("shop", b"shop-key"),
    key(STAFF, b"staff-key"),
)


def sent(*values: bytes) -> Headers:
    return [(b"host", b"localhost"), *((b"authorization", value) for value in values)]


@pytest.mark.parametrize(
    "headers", [[], sent(), sent(b"Bearer anything"), sent(b"\xff"), sent(b"a", b"b")]
)
def test_without_configured_keys_everyone_is_the_default_client(headers: Headers) -> None:
    assert authenticate(headers, ()) == DEFAULT_CLIENT == "default"


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (b"Bearer order-key-1", "order"),
        (b"Bearer order-key-2", "order"),
        (b"Bearer shop-key", "shop"),
        (b"Bearer staff-key", "staff"),
        (b"bearer shop-key", "shop"),
        (b"BEARER shop-key", "shop"),
        (b"Bearer  shop-key ", "shop"),
    ],
)
def test_a_good_key_names_its_client(value: bytes, client: str) -> None:
    assert authenticate(sent(value), KEYS) == client


@pytest.mark.parametrize(
    "headers",
    [
        [],
        sent(),
        sent(b""),
        sent(b"Bearer"),
        sent(b"Bearer "),
        sent(b"Bearer wrong"),
        sent(b"Bearer order-key"),
        sent(b"Bearer order-key-11"),
        sent(b"Bearer ORDER-KEY-1"),
        sent(b"Bearer order-key-1,order-key-2"),
        sent(b"Bearer order"),
        sent(b"Bearer " + hashlib.sha256(b"shop-key").hexdigest().encode()),
        sent(b"Bearer " + hashlib.sha256(b"shop-key").digest()),
        sent(b"Bearer \xff\xfe\xc3\xa9"),
        sent("Bearer clé-ключ".encode()),
        sent(b"\xff\xfe"),
        sent(b"Basic shop-key"),
        sent(b"Bearershop-key"),
        sent(b"shop-key"),
        sent(b"Bearer shop-key", b"Bearer shop-key"),
        sent(b"Bearer shop-key", b"Bearer staff-key"),
        sent(b"Bearer wrong", b"Bearer shop-key"),
        [(b"x-authorization", b"Bearer shop-key")],
    ],
)
def test_anything_else_is_unauthorized(headers: Headers) -> None:
    with pytest.raises(Unauthorized) as caught:
        authenticate(headers, KEYS)
    assert caught.value.status == 401
    assert "key-" not in str(caught.value)


def test_a_key_may_hold_other_bytes_than_ascii() -> None:
    secret = "clé-ключ".encode()
    assert authenticate(sent(b"Bearer " + secret), (key("shop", secret),)) == "shop"


@pytest.mark.parametrize(("client", "whose"), [("order", "order"), ("shop", "shop"), (STAFF, None)])
def test_a_client_reads_its_own_payments_and_staff_all(client: str, whose: str | None) -> None:
    assert may_read(client) == whose


def test_without_configured_keys_everyone_reads_all() -> None:
    assert may_read(authenticate([], ())) is None
