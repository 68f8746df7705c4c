"""Authenticates a request when its header section was read, and admits or rejects it.

A rejected request never becomes a task and holds no place, and its body is not read. Requests
without an API key must not use up the capacity of clients: each open path has its own limit, and
all responses written here share one as well (throttle.py).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client import Counter

from payments.admission import Admission, Client, Share
from payments.clients import ApiKey
from payments.errors import Unauthorized
from payments.observability.metrics import Telemetry
from web.auth import authenticate
from web.paths import WEBHOOK, Paths
from web.serving.access_log import RefusalLog
from web.serving.answers import NOT_FOUND, TOO_BUSY, TOO_BUSY_OPEN, UNAUTHORIZED, PreparedAnswer
from web.serving.guard import BODY_MAX, WEBHOOK_BODY_MAX
from web.serving.heads import METHODS, Headers
from web.serving.throttle import Bucket, Throttle, Waiting

OPEN_MAX = 64  # concurrent requests for one open path: they wait while the database is silent
OPEN_PER_S = 50  # requests for one open path in a second
WEBHOOKS_PER_S = 300  # webhooks of all providers
FORGED_TIMES = 3  # one without a valid signature counts as so many
ALIVE_PER_S = 100  # responses of /health/live in a second that are not delayed

_READS = (b"GET", b"HEAD")
_METHODS = {method.encode(): method for method in METHODS} | {b"HEAD": "GET"}

# A path's latest known response, without any I/O; None if there is none.
Known = Callable[[], PreparedAnswer | None]


class Place(Protocol):
    """Counts admitted requests of a client or of an open path."""

    name: str | None  # the client's
    memory: Share | None  # None: its connection's own

    def admit(self) -> bool:
        """Whether one more may be admitted; if so, the caller must `enter`."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class OpenPath:
    """A path that needs no API key."""

    name = None
    memory: Share | None = None
    body_max = BODY_MAX

    def __init__(self, template: str, known: Known | None, per_s: float) -> None:
        self.template = template
        self.known = known
        self._bucket = Bucket(per_s)
        self._under_way = 0

    def admit(self) -> bool:
        return self._under_way < OPEN_MAX and self._bucket.take()

    def enter(self) -> None:
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1


class WebhookPath(OpenPath):
    """The path of all providers' webhooks. Only their signature tells who sent them, and that takes
    the whole body."""

    body_max = WEBHOOK_BODY_MAX

    def __init__(self, template: str, memory: Share) -> None:
        super().__init__(template, None, WEBHOOKS_PER_S)
        self.memory = memory

    def was_forged(self) -> None:
        """One of those that were admitted."""
        self._bucket.pay(FORGED_TIMES - 1)


class Door:
    """One per port."""

    def __init__(
        self,
        paths: Paths,
        keys: tuple[ApiKey, ...],
        admission: Admission,
        telemetry: Telemetry,
        *,
        alive: Mapping[str, PreparedAnswer],
        known: Mapping[str, Known],
    ) -> None:
        """By path: `alive` holds constant responses; `known` returns the latest response, which is
        sent to requests beyond the path's limit."""
        self._paths = paths
        self._keys = keys
        self._admission = admission
        self._telemetry = telemetry
        self._alive = alive
        self._open = {
            path.template: OpenPath(path.template, known.get(path.template), OPEN_PER_S)
            for path in paths.all
            if not path.needs_key
        }
        if WEBHOOK in self._open:
            self._open[WEBHOOK] = WebhookPath(WEBHOOK, admission.webhook_memory.share())
        self._throttle = Throttle()
        self._alive_at_once = Bucket(ALIVE_PER_S)
        self._busy, self._not_found, self._unauthorized = (
            telemetry.problems.labels(answer.code) for answer in (TOO_BUSY, NOT_FOUND, UNAUTHORIZED)
        )
        self._counters: dict[tuple[bytes, str, int], Counter] = {}
        self.log = RefusalLog()

    def anonymous_memory(self) -> Share:
        """The memory limit of one connection without a client."""
        return self._admission.anonymous_memory.share()

    def look(
        self, method: bytes, target: bytes, headers: Headers
    ) -> "Client | OpenPath | PreparedAnswer":
        """The client or open path of a request, or the response that rejects it; ValueError for an
        invalid target.

        `admit` may still reject a client's request.
        """
        path = self._paths.fixed.get(target) or self._paths.find(target)
        if path is None:
            self.log.not_found.add()
            return self._counted(NOT_FOUND, method, "unmatched")
        if not path.needs_key:
            alive = self._alive.get(path.template)
            if alive is not None and method in _READS:
                return self._counted(alive, method, path.template)
            return self._open[path.template]
        try:
            return self._admission.client(authenticate(headers, self._keys))
        except Unauthorized:
            self.log.unauthorized.add()
            return self._counted(UNAUTHORIZED, method, path.template)

    def refusal(self, place: Client | OpenPath | None, method: bytes) -> PreparedAnswer:
        """The response to a request that was not admitted; None: before its path is known."""
        if isinstance(place, Client):
            self._telemetry.refusals.inc()
            self._busy.inc()
            self.log.too_busy.add()
            return TOO_BUSY
        if place is not None and place.known is not None and method in _READS:
            known = place.known()
            if known is not None:
                return self._counted(known, method, place.template)
        self._telemetry.open_refusals.inc()
        self._busy.inc()
        self.log.too_busy_open.add()
        return TOO_BUSY_OPEN

    def may_answer(self, answer: PreparedAnswer, who: Waiting) -> bool:
        """Whether the response may be sent now; if not, `who.on_turn` is called later."""
        if not answer.waits:
            return True
        if answer in self._alive.values() and self._alive_at_once.take():
            return True
        return self._throttle.is_next(who)

    def forget(self, who: Waiting) -> None:
        self._throttle.forget(who)

    def _counted(self, answer: PreparedAnswer, method: bytes, route: str) -> PreparedAnswer:
        key = (method, route, answer.status)
        counter = self._counters.get(key)
        if counter is None:
            labels = (_METHODS.get(method, "other"), route, answer.status)
            counter = self._counters[key] = self._telemetry.requests.labels(*labels)
        counter.inc()
        if answer is NOT_FOUND:
            self._not_found.inc()
        elif answer is UNAUTHORIZED:
            self._unauthorized.inc()
        return answer
