"""How much memory a connection holds: counted in bytes, which whoever sends them cannot make many
of for free, as requests or headers can be."""

from collections import deque

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from payments.admission import REQUEST_BYTES, Share
from web.serving.guard import BODY_MAX

HEADER_BYTES = 128  # what a header takes besides its own bytes
BODY_FREE = 1024  # bytes that the body of a request may have without being counted
BODY_HELD_MAX = HIGH_WATER_LIMIT + BODY_MAX  # of one request: in the protocol and in the guard


class Memory:
    """Of one connection: the head that is being read, and the requests that are not answered yet,
    in their order.

    The head counts against the connection's `own` share, a request against its client's. What
    returns a bool takes nothing if it is False.
    """

    def __init__(self, own: Share) -> None:
        self.own = own
        self._read = self._head = self._body = 0
        self._requests: deque[tuple[Share, int]] = deque()

    def hold_head(self, read: int, headers: int) -> bool:
        """So many more bytes were read, and it is not complete; so many headers are."""
        self._read += read
        more = self._read + HEADER_BYTES * headers - self._head
        taken = self.own.take(more)
        self._head += more if taken else 0
        return taken

    def let_go_of_head(self) -> None:
        if self._read:  # most come as a whole
            self.own.add(-self._head)
            self._head = self._read = 0

    def hold_request(self, share: Share, size: int, headers: int) -> bool:
        """Its head has so many bytes."""
        held = REQUEST_BYTES + size + HEADER_BYTES * headers
        if not share.take(held):
            return False
        self._requests.append((share, held))
        self._body = 0
        return True

    def hold_none(self) -> None:
        """For a request of which nothing is kept."""
        self._requests.append((self.own, 0))

    def hold_body(self, read: int) -> bool:
        """So many more bytes of the last request's body."""
        before, self._body = self._body, min(self._body + read, BODY_HELD_MAX)
        if self._body <= BODY_FREE:
            return True
        share, held = self._requests[-1]
        more = self._body - before
        if not share.take(more):
            return False
        self._requests[-1] = share, held + more
        return True

    def let_go_of_request(self) -> None:
        """The first one is answered."""
        share, held = self._requests.popleft()
        share.add(-held)

    def let_go(self) -> None:
        """Of everything."""
        self.let_go_of_head()
        while self._requests:
            self.let_go_of_request()
