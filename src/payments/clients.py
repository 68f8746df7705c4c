"""Actors: the clients that API keys identify, and the service's own reserved names."""

import re

import msgspec

DEFAULT_CLIENT = "default"  # every client, when no API keys are configured
SETTLING = "settling"  # the actor in events that settling appends
DISPATCHER = "dispatcher"  # the actor of callbacks, in a payment's history
FULFILMENT = "fulfilment"  # the actor that gives back payments of failed orders
# A client with one of these names would count as every client, or as the service itself.
RESERVED_CLIENTS = frozenset({DEFAULT_CLIENT, SETTLING, DISPATCHER, FULFILMENT})


class ApiKey(msgspec.Struct, frozen=True):
    """A valid key of an API client; `sha256` is the digest of the key, never the key itself."""

    client: str
    sha256: bytes


def check_client_name(name: str) -> None:
    """Raises ValueError."""
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ValueError(
            "must name a client with 1 to 64 of a-z, 0-9, _ and -, the first a letter or digit"
        )
    if name in RESERVED_CLIENTS:
        raise ValueError(f"must not name a client {name!r}: the service uses this name itself")


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of `name:sha256hex`, or of several separated by commas. Raises ValueError, which
    contains no digest."""
    keys = []
    for entry in text.split(","):
        name, _, digest = entry.strip().partition(":")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("must be entries name:sha256hex, separated by commas")
        check_client_name(name)
        keys.append(ApiKey(name, bytes.fromhex(digest)))
    if len({key.sha256 for key in keys}) != len(keys):
        raise ValueError("must not contain the same key twice")
    return tuple(keys)
