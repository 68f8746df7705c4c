"""Parsers of environment variables.

Each raises ValueError, which says what the value must be and never contains it, since it may be a
secret.
"""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from payments.http_url import HttpUrl, parse_http_url
from payments.money import DECIMALS

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ACTION_REQUIRED = "ACTION_REQUIRED"
CALLBACK_STATUSES = ("SUCCESS", "FAILED", "REFUNDED", ACTION_REQUIRED)
ORDER_ID = "{order_id}"  # the placeholder for an order's id in ORDER_STATUS_URL


GATEWAY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
BUILT_IN_GATEWAYS = ("stripe", "razorpay", "paypal")  # gateways/building.py has their factories
_GATEWAY = re.compile(
    rf"{'|'.join(BUILT_IN_GATEWAYS)}|simulated(-[a-z0-9-]{{1,32}})?|[A-Za-z_][\w.]*:[A-Za-z_]\w*"
)


class CurrencyGateway(NamedTuple):
    """New payments in the currency go to the provider with this name."""

    currency: str
    gateway: str

    def __str__(self) -> str:
        return f"{self.currency}:{self.gateway}"


def parse_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable text")
    return value


def parse_text(value: str) -> str:
    parse_line(value)
    # The value is shown in messages, and a URL or connection string often has a password.
    if "://" in value or re.search(r"password\s*=", value, re.IGNORECASE):
        raise ValueError("must be neither an address with :// nor a connection string")
    return value


def parse_host(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value) and not _is_ip_address(value):
        raise ValueError("must be a host name or an IP address, without a port")
    return value


def parse_hosts(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        is_socket = part.startswith("/") or re.fullmatch(r"@[\w./-]+", part)
        (parse_text if is_socket else parse_host)(part)
    return ",".join(parts)


def _is_ip_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def one_of(*choices: str, upper: bool = False) -> Callable[[str], str]:
    def parse(value: str) -> str:
        value = value.upper() if upper else value
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def parse_directory(value: str) -> Path:
    return Path(parse_text(value)).absolute()


def parse_gateway(value: str) -> str:
    if not _GATEWAY.fullmatch(value):
        raise ValueError(
            f"must be {', '.join(BUILT_IN_GATEWAYS)}, simulated, simulated-NAME (NAME of a-z, 0-9 "
            "and -), or package.module:factory"
        )
    return value


def parse_gateways(value: str) -> tuple[str, ...]:
    try:
        chosen = tuple(parse_gateway(part.strip()) for part in value.split(","))
    except ValueError as error:
        raise ValueError(f"{error}; several are separated by commas") from None
    if len(set(chosen)) != len(chosen):
        raise ValueError("must name each provider once")
    return chosen


def parse_names(value: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(","))
    if not all(re.fullmatch(r"[a-z0-9_]{1,64}", name) for name in names):
        raise ValueError("must be names of a-z, 0-9 and _, separated by commas")
    if len(set(names)) != len(names):
        raise ValueError("must hold each name once")
    return names


def parse_word(value: str) -> str:
    """A credential: a blank or a line's end in it was copied by mistake."""
    if not re.fullmatch(r"[\x21-\x7e]{1,512}", value) or "://" in value:
        raise ValueError("must be one word of ASCII characters, and no address")
    return value


def parse_words(value: str) -> tuple[str, ...]:
    words = tuple(part.strip() for part in value.split(","))
    try:
        return tuple(parse_word(word) for word in words)
    except ValueError:
        raise ValueError("must be words of ASCII characters, separated by commas") from None


def parse_gateway_by_currency(value: str) -> tuple[CurrencyGateway, ...]:
    chosen = []
    for part in value.split(","):
        currency, _, gateway = part.strip().partition(":")
        if not GATEWAY_NAME.fullmatch(gateway):
            raise ValueError("must be pairs like USD:name, separated by commas")
        if currency not in DECIMALS:
            raise ValueError("must name currencies by their ISO 4217 codes, like USD")
        chosen.append(CurrencyGateway(currency, gateway))
    if len({each.currency for each in chosen}) != len(chosen):
        raise ValueError("must name each currency once")
    return tuple(chosen)


def parse_return_url_prefixes(value: str) -> tuple[str, ...]:
    """Scheme and host in lower case, without the scheme's own port."""
    return tuple(_return_url_prefix(part.strip()) for part in value.split(","))


def _return_url_prefix(value: str) -> str:
    url = parse_http_url(value)
    # Without a path, shop.example would be a prefix of shop.example.com.
    if url.scheme != "https" or "/" not in value.partition("://")[2]:
        raise ValueError("must be https:// addresses that end in a path, if only in /")
    if "?" in value or "\\" in value or "/." in url.path_qs:
        raise ValueError("must hold no query, no backslash, and no part that begins with a dot")
    return f"{url.origin}{url.path_qs}"


def parse_yes_no(value: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def parse_order_status_url(value: str) -> HttpUrl:
    """A URL with ORDER_ID in its path or query."""
    if value.count(ORDER_ID) != 1:
        raise ValueError(f"must contain {ORDER_ID} once, in its path or query")
    if ORDER_ID in value.partition("://")[2].partition("/")[0]:
        raise ValueError(f"must contain {ORDER_ID} in its path or query, not in its host")
    return parse_http_url(value)


def parse_statuses(value: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in value.split(","))
    if not set(chosen) <= set(CALLBACK_STATUSES) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"must be some of {', '.join(CALLBACK_STATUSES)}, each once, separated by commas"
        )
    return chosen


def parse_networks(value: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(","))
    except ValueError:
        raise ValueError(
            "must be networks as CIDRs, like 100.64.0.0/10, with all host bits zero, "
            "separated by commas"
        ) from None
