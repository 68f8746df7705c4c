"""The memory of a connection, counted in bytes: many small requests or headers cost a client
little, but use memory here."""

from collections import deque

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from payments.admission import REQUEST_BYTES, Share
from web.serving.guard import BODY_MAX

HEADER_BYTES = 128  # overhead of one header
BODY_FREE = 1024  # bytes of a request's body that are not counted
BODY_HELD = HIGH_WATER_LIMIT  # of one request in the protocol, beside what the guard has


class Memory:
    """Of one connection: the header section that is being read, and the requests without a
    response, in order.

    The header section counts against the connection's `own` share, a request against its client's.
    Methods that return False have reserved nothing.
    """

    def __init__(self, own: Share) -> None:
        self.own = own
        self._read = self._head = self._body = 0
        self._body_held_max = BODY_HELD + BODY_MAX
        self._requests: deque[tuple[Share, int]] = deque()

    def hold_head(self, read: int, headers: int) -> bool:
        """`read` more bytes of an incomplete header section were read; it has `headers` headers so
        far."""
        self._read += read
        more = self._read + HEADER_BYTES * headers - self._head
        taken = self.own.take(more)
        self._head += more if taken else 0
        return taken

    def let_go_of_head(self) -> None:
        if self._read:  # most arrive in one piece and were not counted
            self.own.add(-self._head)
            self._head = self._read = 0

    def hold_request(self, share: Share, size: int, headers: int, body_max: int = BODY_MAX) -> bool:
        """`size` is of its header section, in bytes; `body_max` that of the body that is read."""
        held = REQUEST_BYTES + size + HEADER_BYTES * headers
        if not share.take(held):
            return False
        self._requests.append((share, held))
        self._body, self._body_held_max = 0, BODY_HELD + body_max
        return True

    def hold_none(self) -> None:
        """For a request that uses no memory, to keep the order."""
        self._requests.append((self.own, 0))

    def hold_body(self, read: int) -> bool:
        """`read` more bytes of the last request's body were read."""
        before, self._body = self._body, min(self._body + read, self._body_held_max)
        if self._body <= BODY_FREE:
            return True
        share, held = self._requests[-1]
        more = self._body - before
        if not share.take(more):
            return False
        self._requests[-1] = share, held + more
        return True

    def let_go_of_request(self) -> None:
        """The oldest request got its response."""
        share, held = self._requests.popleft()
        share.add(-held)

    def let_go(self) -> None:
        """Frees everything."""
        self.let_go_of_head()
        while self._requests:
            self.let_go_of_request()
