"""HTTP addresses of settings: which are taken, what they become, and that none is repeated."""

import traceback

import pytest

from payments.http_url import parse_http_url

CANARY = "canary5ecretcanary5ecret"
NAME = "order-service.test"


@pytest.mark.parametrize(
    ("text", "origin", "host", "port", "path_qs"),
    [
        ("http://host", "http://host", "host", 80, "/"),
        ("HTTPS://Host:443/A?b", "https://host", "host", 443, "/A?b"),
        ("https://host:80/", "https://host:80", "host", 80, "/"),
        ("http://host:/cb", "http://host", "host", 80, "/cb"),
        ("http://host?x=1", "http://host", "host", 80, "/?x=1"),
        ("http://host/?", "http://host", "host", 80, "/?"),
        ("http://host/a%2Fb/../c?x=%2F", "http://host", "host", 80, "/a%2Fb/../c?x=%2F"),
        ("http://host//a@b:c", "http://host", "host", 80, "//a@b:c"),
        ("http://127.0.0.1:65535/", "http://127.0.0.1:65535", "127.0.0.1", 65535, "/"),
        ("http://[::1]:4002/cb", "http://[::1]:4002", "::1", 4002, "/cb"),
        ("http://[fe80::1%eth0]/", "http://[fe80::1%eth0]", "fe80::1%eth0", 80, "/"),
        ("https://MÜLLER.de/ü", "https://xn--mller-kva.de", "xn--mller-kva.de", 443, "/ü"),
        ("https://straße.de/", "https://xn--strae-oqa.de", "xn--strae-oqa.de", 443, "/"),
    ],
)
def test_what_an_address_becomes(
    text: str, origin: str, host: str, port: int, path_qs: str
) -> None:
    url = parse_http_url(text)
    assert (url.origin, url.host, url.port, url.path_qs) == (origin, host, port, path_qs)
    assert str(url) == text
    assert repr(url) == f"HttpUrl({origin!r})"


@pytest.mark.parametrize(
    "text",
    [
        "",
        CANARY,
        f"ftp://{CANARY}/",
        f"//{NAME}/{CANARY}",
        f"http:///{CANARY}",
        f"http://?{CANARY}",
        f"http://user:{CANARY}@{NAME}",
        f"http://{CANARY}@{NAME}",
        f"http://{CANARY}@",
        f"http://@{NAME}/{CANARY}",
        f"http://{NAME}:{CANARY}",
        f"http://{NAME}:99{CANARY}",
        f"http://{NAME}:0/{CANARY}",
        f"http://{NAME}:65536/{CANARY}",
        f"http://{NAME}:{'9' * 5000}/{CANARY}",
        f"http://{NAME}:٤٠/{CANARY}",
        f"http://{NAME}/#{CANARY}",
        f"http://{NAME}/{CANARY}\n",
        f"http://{NAME}/ {CANARY}",
        f" http://{NAME}/{CANARY}",
        f"http://[::1/{CANARY}",
        f"http://[::1]a/{CANARY}",
        f"http://a[::1]/{CANARY}",
        f"http://[v1.a]/{CANARY}",
        f"http://[{CANARY}]/",
        f"http://2130706433/{CANARY}",
        f"http://127.1/{CANARY}",
        f"http://0177.0.0.1/{CANARY}",
        f"http://127.0.0.256/{CANARY}",
        # Another name than the one that was given, once IDNA has mapped its characters.
        f"http://ＡＢＣ.de/{CANARY}",
        f"http://ſ.de/{CANARY}",
        f"http://①27.0.0.1/{CANARY}",
        f"http://a℀b.de/{CANARY}",
        f"http://a..ü/{CANARY}",
    ],
)
def test_an_unusable_one_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must (be an http|not contain a user)") as raised:
        parse_http_url(text)
    assert CANARY not in "".join(traceback.format_exception(raised.value))
