"""Who a request comes from."""

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from payments.clients import DEFAULT_CLIENT, ApiKey
from payments.errors import Unauthorized
from tests.web.requests import key
from web.auth import KEY_MAX, STAFF, authenticate, may_read
from web.requests import client_of

Headers = list[tuple[bytes, bytes]]


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


def digest_like(secret: bytes, alike: slice) -> bytes:
    """A digest that is the key's own at these bytes, and another one at all others."""
    own = hashlib.sha256(secret).digest()
    other = bytearray(byte ^ 0xFF for byte in own)
    other[alike] = own[alike]
    return bytes(other)


ALIKE = {
    "the first 4 bytes": slice(0, 4),
    "the first 8 bytes": slice(0, 8),
    "the first 16 bytes": slice(0, 16),
    "all but the last byte": slice(0, 31),
    "all but the first byte": slice(1, 32),
    "the last 4 bytes": slice(28, 32),
}


@pytest.mark.parametrize("alike", ALIKE.values(), ids=ALIKE)
def test_only_the_whole_digest_opens(alike: slice) -> None:
    own, nearly = key("shop", b"shop-key"), ApiKey("order", digest_like(b"shop-key", alike))
    for configured in ((own, nearly), (nearly, own)):
        assert authenticate(sent(b"Bearer shop-key"), configured) == "shop"
    with pytest.raises(Unauthorized):
        authenticate(sent(b"Bearer shop-key"), (nearly,))


@pytest.mark.parametrize("place", range(32))
def test_every_byte_of_the_digest_counts(place: int) -> None:
    digest = bytearray(hashlib.sha256(b"shop-key").digest())
    digest[place] ^= 1
    with pytest.raises(Unauthorized):
        authenticate(sent(b"Bearer shop-key"), (ApiKey("shop", bytes(digest)),))


@pytest.mark.parametrize("length", [0, 4, 31])
def test_a_digest_that_is_cut_short_opens_nothing(length: int) -> None:
    short = ApiKey("shop", hashlib.sha256(b"shop-key").digest()[:length])
    with pytest.raises(Unauthorized):
        authenticate(sent(b"Bearer shop-key"), (short,))


def test_keys_that_begin_or_end_alike_are_two() -> None:
    secrets = (b"k" * 300, b"k" * 300 + b"1", b"k" * 301, b"1" + b"k" * 300)
    keys = tuple(key(f"client-{number}", secret) for number, secret in enumerate(secrets))
    for number, secret in enumerate(secrets):
        assert authenticate(sent(b"Bearer " + secret), keys) == f"client-{number}"


def test_what_is_longer_than_any_key_is_not_even_digested() -> None:
    secret = b"k" * KEY_MAX
    longest = secret[: KEY_MAX - len(b"Bearer ")]
    assert authenticate(sent(b"Bearer " + longest), (key("shop", longest),)) == "shop"
    with pytest.raises(Unauthorized):
        authenticate(sent(b"Bearer " + secret), (key("shop", secret),))


def test_whom_the_protocol_found_is_not_asked_for_again() -> None:
    request: Any = SimpleNamespace(scope={"state": {"client": "shop"}, "headers": []})
    assert client_of(request) == "shop"


def test_a_key_may_hold_other_bytes_than_ascii() -> None:
    secret = "clé-ключ".encode()
    assert authenticate(sent(b"Bearer " + secret), (key("shop", secret),)) == "shop"


@pytest.mark.parametrize(("client", "whose"), [("order", "order"), ("shop", "shop"), (STAFF, None)])
def test_a_client_reads_its_own_payments_and_staff_all(client: str, whose: str | None) -> None:
    assert may_read(client) == whose


def test_without_configured_keys_everyone_reads_all() -> None:
    assert may_read(authenticate([], ())) is None
