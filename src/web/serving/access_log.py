"""The access log: a line for each response; above a rate, lines are dropped and counted.

Responses of 400 and above are always logged, but for forged webhooks. Money that moves has log
lines of its own, written when it is recorded (payments.commands.outcomes).
"""

import asyncio
from contextvars import Context
from typing import Any

from loguru import logger

from payments.errors import BadWebhookSignature

TALLY_S = 1.0

# Requested by machines every few seconds, without an API key.
PROBES = frozenset(("/health", "/health/live", "/metrics"))

# Logged once a minute and counted, instead of a line each: anyone may send them.
COUNTED = frozenset((BadWebhookSignature.code,))

# Fields that handlers add, under the same names in the scope's state.
LOGGED = ("client", "payment_id", "order_id", "problem")


class Tally:
    """Counts events that are too frequent for a line each, and logs the count once a second."""

    def __init__(self, level: str, message: str) -> None:
        self._level = level
        self._message = message
        self._count = 0

    def add(self) -> None:
        if not self._count:
            # An empty context: the line belongs to no request.
            asyncio.get_running_loop().call_later(TALLY_S, self._tell, context=Context())
        self._count += 1

    def _tell(self) -> None:
        count, self._count = self._count, 0
        logger.bind(requests=count).log(self._level, self._message)


class RefusalLog:
    """Logs the number of requests that are rejected early, often thousands; one per port."""

    def __init__(self) -> None:
        self.too_busy = Tally("WARNING", "requests were rejected: too many in progress")
        self.too_busy_open = Tally(
            "WARNING", "requests were rejected: too many on paths without an API key"
        )
        self.unauthorized = Tally("WARNING", "requests were rejected: no valid API key")
        self.not_found = Tally("INFO", "requests were rejected: unknown path")
        self.unreadable = Tally("INFO", "requests were rejected: not valid HTTP, or above a limit")


class AccessLog:
    """One per port; writes up to `per_s` lines a second."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._written = 0  # in this second
        self._second = 0
        self._left_out = Tally("INFO", "requests left out of the access log")

    def write(
        self, method: str, route: str, status: int, seconds: float, state: dict[str, Any]
    ) -> None:
        """`route` is the template, never the path; `state` is the scope's."""
        level = "INFO"
        if status >= 500:
            level = "ERROR" if status == 500 else "WARNING"
        elif state.get("problem") in COUNTED:
            level = "DEBUG"
        elif status < 400:
            if route in PROBES:
                level = "DEBUG"
            elif not self._may_write():
                self._left_out.add()
                return
        fields = {name: state[name] for name in LOGGED if name in state}
        duration_ms = round(seconds * 1000, 2)
        line = logger.bind(
            method=method, route=route, status=status, duration_ms=duration_ms, **fields
        )
        line.log(level, f"{method} {route} {status}")

    def _may_write(self) -> bool:
        second = int(asyncio.get_running_loop().time())
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        return self._written <= self._per_s
