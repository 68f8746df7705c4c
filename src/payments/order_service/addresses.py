"""The addresses to which plain http may go, without a certificate."""

import ipaddress
from collections.abc import Iterator, Sequence

from payments.setting_values import Network

# Where plain http may go by default, except METADATA.
NEAR = tuple(
    ipaddress.ip_network(block)
    for block in (
        "127.0.0.0/8",  # loopback: RFC 1122 section 3.2.1.3
        "::1/128",
        "10.0.0.0/8",  # private: RFC 1918
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",  # unique local: RFC 4193
    )
)

# Metadata services of clouds, which hand out credentials, as each documents; most are link-local.
# https may go there: it sends nothing before a certificate is verified, and none of them has one.
METADATA = tuple(
    ipaddress.ip_network(block)
    for block in (
        "169.254.0.0/16",  # RFC 3927
        "fe80::/10",  # RFC 4291 section 2.5.6
        "100.100.100.200",  # Alibaba Cloud
        "192.0.0.192",  # Oracle Cloud
        "168.63.129.16",  # Azure
        "fd00:ec2::/32",  # AWS: ::254, for pods ::23
        "fd20:ce::254",  # Google Cloud
        "fd00:c1::a9fe:a9fe",  # Oracle Cloud
        "fd00:100::100:200",  # Alibaba Cloud
        "fd00:42::42",  # Scaleway
        "fd00:a9fe:a9fe::1",  # Akamai, Linode
    )
)


def is_near(address: str, networks: Sequence[Network] = ()) -> bool:
    """Whether it is a loopback or private address, or in one of the `networks`, and neither
    link-local nor a cloud's metadata service. An IPv4-mapped IPv6 address counts as IPv4."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    near = any(parsed in block for block in (*NEAR, *networks))
    return near and not _is_metadata(parsed)


def _is_metadata(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Includes link-local addresses. An IPv6 address may lead to an IPv4 address within it."""
    held = [address] if isinstance(address, ipaddress.IPv4Address) else [address, *_held(address)]
    return any(each in block for each in held for block in METADATA)


def _held(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses within it: of 6to4 (RFC 3056), in the last 32 bits, or after the shorter
    prefix of a translator (RFC 6052 section 2.2), where octet 8 and all following bits are 0."""
    if address.sixtofour is not None:
        yield address.sixtofour
    value = int(address)
    yield ipaddress.IPv4Address(value & 0xFFFFFFFF)
    without_octet_8 = value >> 64 << 56 | value & (1 << 56) - 1
    for prefix in (32, 40, 48, 56, 64):
        behind = 120 - prefix - 32
        if without_octet_8 & (1 << behind) - 1 == 0:
            yield ipaddress.IPv4Address(without_octet_8 >> behind & 0xFFFFFFFF)
