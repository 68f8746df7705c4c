"""Where callbacks may go: TLS, the address table, and names that change their minds."""

import asyncio
import ipaddress
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from payments.errors import StartError
from payments.http_url import parse_http_url
from payments.order_service import addresses as nearness
from payments.order_service import target as targets
from payments.order_service.addresses import is_near
from payments.order_service.target import Target, check_target
from payments.setting_values import Network, parse_networks
from tests.callbacks.raw_server import (
    OK,
    WAIT_S,
    Server,
    anyio_backend,  # noqa: F401 - a fixture
    endpoint_of,
    listening,
    post,
    serving,
)
from tests.doubles.order_receiver import CERTIFICATE, tls_context
from tests.machine import within
from tests.support import until

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.3
LATE_S = 0.3
CANARY = "canary5ecretcanary5ecret"
NAME = "order-service.test"
LOOPBACK = parse_networks("127.0.0.0/8")


def to(url: str, networks: tuple[Network, ...] = ()) -> Target:
    return Target(url=parse_http_url(url), networks=networks)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed with its own key; the directory holds both."""
    directory = tmp_path_factory.mktemp("tls")
    tls_context(directory)
    return directory


class TestTls:
    async def test_a_certificate_that_nobody_trusts(self, certificate: Path) -> None:
        async with (
            serving(OK, tls=tls_context(certificate)) as server,
            endpoint_of(server.url) as endpoint,
        ):
            done = await post(endpoint)
        assert done[:2] == (None, "unreachable")
        assert done.reason == "SSLCertVerificationError: self-signed certificate"
        assert server.requests == []

    @pytest.mark.parametrize("named", ["by the context", "by the environment"])
    async def test_a_certificate_from_an_authority_of_the_house(
        self, certificate: Path, named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tls = None
        if named == "by the context":
            tls = ssl.create_default_context(cafile=str(certificate / CERTIFICATE))
        else:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate / CERTIFICATE))
        async with (
            serving(OK, tls=tls_context(certificate)) as server,
            endpoint_of(server.url, tls=tls) as endpoint,
        ):
            assert [(await post(endpoint)).status for _ in range(2)] == [200, 200]
        assert server.connections == 1

    async def test_a_certificate_of_another_host(self, certificate: Path) -> None:
        tls = ssl.create_default_context(cafile=str(certificate / CERTIFICATE))
        async with (
            serving(OK, host="127.0.0.2", tls=tls_context(certificate)) as server,
            endpoint_of(server.url, tls=tls) as endpoint,
        ):
            done = await post(endpoint)
        assert done[:2] == (None, "unreachable")
        assert done.reason.startswith("SSLCertVerificationError: IP address mismatch")

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    async def test_a_server_without_tls(self, answer: bytes) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(answer)
            writer.close()

        async with listening(serve) as port, endpoint_of(f"https://127.0.0.1:{port}") as endpoint:
            done = await post(endpoint)
        assert done[:2] == (None, "unreachable")

    async def test_there_is_no_farewell(self, certificate: Path) -> None:
        """A server that hangs could draw that of TLS out for half a minute."""

        async def hang(_: Server, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(WAIT_S)

        tls = ssl.create_default_context(cafile=str(certificate / CERTIFICATE))
        async with (
            serving(hang, tls=tls_context(certificate)) as server,
            endpoint_of(server.url, tls=tls, timeout_s=TIMEOUT_S) as endpoint,
        ):
            assert (await post(endpoint))[:2] == (None, "timeout")
            assert server.requests
            with within(1):
                await until(lambda: not connections_to(server.port))


def connections_to(port: int) -> int:
    """How many this process has."""
    open_ones = psutil.Process().net_connections("tcp")
    return sum(1 for each in open_ones if each.raddr and each.raddr.port == port)


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "near"),
        [
            ("127.0.0.1", True),
            ("127.255.255.254", True),
            ("::1", True),
            ("10.0.0.1", True),
            ("10.255.255.255", True),
            ("172.16.0.1", True),
            ("172.31.255.255", True),
            ("192.168.0.1", True),
            ("fc00::1", True),
            ("fdff:ffff::1", True),
            ("::ffff:127.0.0.1", True),
            ("::ffff:10.1.2.3", True),
            ("::ffff:a01:203", True),
            ("8.8.8.8", False),
            ("9.255.255.255", False),
            ("11.0.0.0", False),
            ("126.255.255.255", False),
            ("128.0.0.1", False),
            ("172.15.255.255", False),
            ("172.32.0.0", False),
            ("192.167.255.255", False),
            ("192.169.0.0", False),
            ("0.0.0.0", False),
            ("255.255.255.255", False),
            ("100.64.0.1", False),  # shared with the provider: RFC 6598
            ("169.254.169.254", False),  # link-local: a cloud's credentials
            ("192.0.2.1", False),  # for documents: RFC 5737
            ("198.18.0.1", False),  # for benchmarks: RFC 2544
            ("224.0.0.1", False),
            ("::", False),
            ("2001:4860:4860::8888", False),
            ("fe80::1", False),
            ("fe80::1%eth0", False),
            ("fec0::1", False),  # site-local, abolished by RFC 3879
            ("ff02::1", False),
            ("::ffff:8.8.8.8", False),
            ("::ffff:169.254.169.254", False),
            ("::127.0.0.1", False),  # the form that RFC 4291 abolished
            ("64:ff9b::7f00:1", False),  # through a translator: RFC 6052
            ("2002:7f00:1::1", False),  # 6to4: RFC 3056
            ("fd00:ec2::254", False),  # AWS
            ("fd00:ec2::254%1", False),
            ("fd00:0ec2:0:0:0:0:0:23", False),
            ("fd00:ec2:ffff::1", False),
            ("fd00:ec1::254", True),
            ("fd20:ce::254", False),  # Google Cloud
            ("fd20:ce::253", True),
            ("fd00:c1::a9fe:a9fe", False),  # Oracle Cloud
            ("fd00:100::100:200", False),  # Alibaba Cloud
            ("fd00:42::42", False),  # Scaleway
            ("fd00:a9fe:a9fe::1", False),  # Akamai
            ("fd12:3456::169.254.169.254", False),  # through a translator of the house
            ("fd12:3456::169.254.170.2", False),
            ("fd12:3456::169.253.170.2", True),
            ("fd12:3456::10.0.0.1", True),
            ("fe80::a9fe:a9fe", False),  # OpenStack
            ("64:ff9b::a9fe:a9fe", False),
            ("64:ff9b:1::a9fe:a9fe", False),  # RFC 8215
            ("2002:a9fe:a9fe::1", False),
            ("::a9fe:a9fe", False),
            ("::ffff:0:169.254.169.254", False),  # RFC 2765
            ("100.100.100.200", False),  # Alibaba Cloud
            ("168.63.129.16", False),  # Azure
            ("192.0.0.192", False),  # Oracle Cloud
            ("169.254.170.2", False),  # AWS, for containers
            ("169.254.42.42", False),  # Scaleway
        ],
    )
    def test_where_plain_http_may_go(self, address: str, near: bool) -> None:
        assert is_near(address) is near

    @pytest.mark.parametrize(
        ("address", "near"),
        [
            ("100.64.0.1", True),
            ("34.118.224.7", True),
            ("::ffff:100.64.0.1", True),
            ("10.0.0.1", True),
            ("34.119.0.1", False),
            ("100.100.100.200", False),  # Alibaba Cloud, within 100.64.0.0/10
        ],
    )
    def test_where_else_it_may_go(self, address: str, near: bool) -> None:
        assert is_near(address, parse_networks("100.64.0.0/10,34.118.224.0/20")) is near

    @pytest.mark.parametrize(
        "address",
        [
            *("169.254.169.254", "169.254.170.2", "fe80::1", "fe80::1%eth0", "fe80::a9fe:a9fe"),
            *("fd00:ec2::254", "fd20:ce::254", "fd00:42::42", "100.100.100.200", "192.0.0.192"),
            *(
                "168.63.129.16",
                "::ffff:169.254.169.254",
                "64:ff9b::a9fe:a9fe",
                "64:ff9b::6464:64c8",
            ),
            *("2002:a9fe:a9fe::1", "::a9fe:a9fe"),
            # Behind a translator's prefix of 32, 40, 48, 56 and 64 bits.
            *("64:ff9b:a9fe:a9fe::", "64:ff9b:a9:fea9:fe::", "64:ff9b:1:a9fe:a9:fe00::"),
            "64:ff9b:1:6464:64:c800::",
            *("64:ff9b:1:a9:fe:a9fe::", "64:ff9b:1:2:a9:fea9:fe00:0"),
        ],
    )
    def test_metadata_and_link_local_never_whatever_is_said(self, address: str) -> None:
        assert not is_near(address, parse_networks("0.0.0.0/0,::/0"))
        assert not is_near(address, parse_networks(address.partition("%")[0]))

    async def test_a_network_that_is_named_is_connected_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nearness, "NEAR", ())
        async with serving(OK) as server:
            async with endpoint_of(server.url) as endpoint:
                assert (await post(endpoint)).error == "forbidden_address"
            with pytest.raises(StartError, match="HTTP_CALLBACK_NETWORKS"):
                await check_target(to(server.url))
            async with endpoint_of(server.url, networks=LOOPBACK) as endpoint:
                assert (await post(endpoint)).status == 200
            assert await check_target(to(server.url, LOOPBACK)) is None

    @pytest.fixture
    def only_127_0_0_1_is_near(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that a server of ours can stand at an address that is not."""
        monkeypatch.setattr(nearness, "NEAR", (ipaddress.ip_network("127.0.0.1/32"),))

    @pytest.mark.usefixtures("only_127_0_0_1_is_near")
    async def test_an_address_in_the_url_is_looked_at(self) -> None:
        async with (
            serving(OK, host="127.0.0.2") as server,
            endpoint_of(server.url) as endpoint,
        ):
            done = await post(endpoint)
        assert done[:3] == (
            None,
            "forbidden_address",
            "plain http to a metadata service, or to an address that is not loopback or private",
        )
        assert server.connections == 0

    @pytest.mark.usefixtures("only_127_0_0_1_is_near")
    async def test_every_address_of_a_name_is_looked_at(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(OK, host="127.0.0.2") as far:
            names(monkeypatch, ["127.0.0.2", "127.0.0.3"])
            async with endpoint_of(f"http://{NAME}:{far.port}") as endpoint:
                assert (await post(endpoint)).error == "forbidden_address"
            names(monkeypatch, ["127.0.0.2", "127.0.0.1"])
            async with endpoint_of(f"http://{NAME}:{far.port}") as endpoint:
                assert (await post(endpoint)).status is None
        assert far.connections == 0

    @pytest.mark.usefixtures("only_127_0_0_1_is_near")
    async def test_of_several_addresses_one_that_may_be_used_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names(monkeypatch, ["127.0.0.2", "127.0.0.1"])
        async with serving(OK) as near, endpoint_of(f"http://{NAME}:{near.port}") as endpoint:
            assert (await post(endpoint)).status == 200
        assert b"host: %s:%d\r\n" % (NAME.encode(), near.port) in near.requests[0].lower()

    @pytest.mark.usefixtures("only_127_0_0_1_is_near")
    async def test_a_name_cannot_mean_another_address_later(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(OK, host="127.0.0.2") as far:
            url = f"http://{NAME}:{far.port}"
            names(monkeypatch, ["127.0.0.1"])
            assert await check_target(to(url)) is None
            names(monkeypatch, ["127.0.0.2"])
            async with endpoint_of(url) as endpoint:
                assert (await post(endpoint)).error == "forbidden_address"
        assert far.connections == 0

    async def test_a_metadata_service_is_refused_as_it_is_connected_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nearness, "METADATA", (ipaddress.IPv6Network("::1"),))
        async with (
            serving(OK, host="::1") as server,
            endpoint_of(f"http://[::1]:{server.port}") as endpoint,
        ):
            assert (await post(endpoint)).error == "forbidden_address"
        assert server.connections == 0

    @pytest.mark.usefixtures("only_127_0_0_1_is_near")
    async def test_https_may_go_anywhere(self, certificate: Path) -> None:
        tls = ssl.create_default_context(cafile=str(certificate / CERTIFICATE))
        tls.check_hostname = False
        async with (
            serving(OK, host="127.0.0.2", tls=tls_context(certificate)) as server,
            endpoint_of(server.url, tls=tls) as endpoint,
        ):
            assert (await post(endpoint)).status == 200

    async def test_a_name_that_cannot_be_resolved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names(monkeypatch, [])
        async with endpoint_of(f"http://{NAME}:1") as endpoint:
            assert (await post(endpoint))[:3] == (None, "unreachable", "gaierror")


def names(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """What NAME means from now on."""

    def getaddrinfo(host: str, port: object, **_: Any) -> list[Any]:
        assert host == NAME
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


class TestCheckTarget:
    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:4000/callback",
            "http://[::1]:4000/callback",
            "http://10.1.2.3/",
            "https://8.8.8.8/",
            "https://[2001:4860:4860::8888]/",
            "https://[fd00:ec2::254]/",
        ],
    )
    async def test_what_can_work(self, url: str) -> None:
        assert await check_target(to(url)) is None

    @pytest.mark.parametrize(
        "addresses", [["10.1.2.3"], ["8.8.8.8", "10.1.2.3"], ["fd00:ec2::254", "fd12::1"]]
    )
    async def test_a_name_with_a_private_address(
        self, addresses: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names(monkeypatch, addresses)
        assert await check_target(to(f"http://{NAME}/")) is None

    async def test_a_public_name_with_https(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names(monkeypatch, ["8.8.8.8"])
        assert await check_target(to(f"https://{NAME}/")) is None

    @pytest.mark.parametrize(
        "host",
        [
            *("8.8.8.8", "[2001:4860:4860::8888]", "169.254.169.254", NAME),
            *("[fd00:ec2::254]", "[fd20:ce::254]", "[fd12:3456::a9fe:a9fe]"),
        ],
    )
    async def test_plain_http_to_a_public_address_stops_the_start(
        self, host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if host == NAME:
            names(monkeypatch, ["8.8.8.8", "8.8.4.4"])
        with pytest.raises(StartError) as raised:
            await check_target(to(f"http://{host}/{CANARY}?token={CANARY}"))
        assert str(raised.value) == (
            f"ORDER_CALLBACK_URL: http://{host} has no loopback or private address, and plain "
            "http is allowed to those only (never to cloud metadata services); use https, or add "
            "its network to HTTP_CALLBACK_NETWORKS"
        )

    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_a_name_that_cannot_be_resolved_yet_is_a_warning(
        self, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names(monkeypatch, [])
        warning = await check_target(to(f"{scheme}://{NAME}/{CANARY}"))
        assert warning == f"{NAME} cannot be resolved yet: callbacks will wait until it can be"

    async def test_a_name_server_that_hangs_does_not_hold_up_the_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answering = threading.Event()

        def hang(*_: Any, **__: Any) -> Any:
            answering.wait(WAIT_S)
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", hang)
        monkeypatch.setattr(targets, "RESOLVE_TIMEOUT_S", TIMEOUT_S)
        try:
            with within(TIMEOUT_S + LATE_S):
                assert "cannot be resolved" in str(await check_target(to(f"http://{NAME}/")))
        finally:
            answering.set()
