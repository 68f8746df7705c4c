"""HTTP URLs in settings: parsed once, and used as parsed."""

import ipaddress
import re

import msgspec

_PORTS = {"http": 80, "https": 443}
_HTTP_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:(?P<user>[^/?#]*)@)?"
    r"(?P<host>\[[^\[\]/?#]*\]|[^\[\]@:/?#]+)(?::(?P<port>[0-9]*))?"
    r"(?P<path_qs>[/?][^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE | re.ASCII,
)
_UNUSABLE = "must be an http:// or https:// address"


class HttpUrl(msgspec.Struct, frozen=True, kw_only=True):
    """An http:// or https:// URL, made by parse_http_url.

    `host` is ASCII and in lower case, without the brackets of an IPv6 address. `path_qs` is path
    and query as given. They and `text` may contain a token, so messages show only the origin.
    """

    text: str
    scheme: str
    host: str
    port: int
    path_qs: str

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"HttpUrl({self.origin!r})"

    @property
    def authority(self) -> str:
        """The host, with the port if it is not the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"


def parse_http_url(text: str) -> HttpUrl:
    """Raises ValueError, which does not contain the text: it may have a password."""
    found = _HTTP_URL.fullmatch(text) if text.isprintable() and " " not in text else None
    if found is None:
        raise ValueError(_UNUSABLE)
    scheme = found["scheme"].lower()
    try:
        host = _ascii_host(found["host"])
        port = _port(found["port"]) if found["port"] else _PORTS[scheme]
    except ValueError:
        raise ValueError(_UNUSABLE) from None
    if found["user"] is not None or found["fragment"] is not None:
        raise ValueError("must not contain a user name, password or fragment")
    path_qs = found["path_qs"] or "/"
    path_qs = path_qs if path_qs.startswith("/") else f"/{path_qs}"
    return HttpUrl(text=text, scheme=scheme, host=host, port=port, path_qs=path_qs)


def _ascii_host(host: str) -> str:
    """Raises ValueError."""
    if host.startswith("["):
        ipaddress.IPv6Address(host := host[1:-1])
        return host
    host = host.lower()
    if not host.isascii():
        from yarl import URL  # slow to import

        url = URL.build(scheme="http", host=host)
        if url.raw_host is None or url.host != host:  # another name: IDNA maps some characters
            raise ValueError
        host = url.raw_host
    if host.replace(".", "").isdigit():
        ipaddress.IPv4Address(host)  # not 127.1 or 2130706433, which software reads differently
    return host


def _port(text: str) -> int:
    """Raises ValueError."""
    port = int(text)
    if not 0 < port < 65536:
        raise ValueError
    return port
