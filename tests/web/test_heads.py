"""What is taken from a request's head: its trace context."""

import pytest

from web.serving.heads import traceparent_of

IDS = b"0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
TRACE = b"00-" + IDS + b"-01"


def read(*values: bytes) -> str | None:
    return traceparent_of([(b"host", b"x"), *((b"traceparent", value) for value in values)])


@pytest.mark.parametrize("sent", [TRACE, b"00-" + IDS + b"-00", b"00-" + IDS + b"-ff"])
def test_our_version_goes_on_as_it_came(sent: bytes) -> None:
    assert read(sent) == sent.decode()
    assert read(b" \t" + sent + b"\t ") == sent.decode()


@pytest.mark.parametrize(
    ("later", "ours"),
    [
        (b"01-" + IDS + b"-01", b"-01"),
        (b"fe-" + IDS + b"-00", b"-00"),
        (b"cc-" + IDS + b"-01-what-the-future-holds", b"-01"),
        (b"cc-" + IDS + b"-fe-", b"-00"),
        (b"01-" + IDS + b"-ff-\xff", b"-01"),
    ],
)
def test_a_later_version_is_put_into_ours(later: bytes, ours: bytes) -> None:
    """Section 4.2 of W3C Trace Context: of its flags only the one for sampled is known."""
    assert read(later) == (b"00-" + IDS + ours).decode()


@pytest.mark.parametrize(
    "values",
    [
        (),
        (b"",),
        (TRACE, TRACE),
        (TRACE, b"x"),
        (TRACE + b"," + TRACE,),
        (TRACE + b"-01",),
        (TRACE + b"-",),
        (b"01-" + IDS + b"-011",),
        (b"01-" + IDS + b"-01.more",),
        (b"ff-" + IDS + b"-01",),
        (b"ff-" + IDS + b"-01-more",),
        (b"0-" + IDS + b"-01",),
        (TRACE.upper(),),
        (TRACE[:-1],),
        (b"01-" + b"0" * 32 + b"-b7ad6b7169203331-01",),
        (b"01-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01",),
    ],
)
def test_what_is_none(values: tuple[bytes, ...]) -> None:
    assert read(*values) is None
