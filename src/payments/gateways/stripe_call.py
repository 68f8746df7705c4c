"""The exchanges of one call of the gateway to Stripe, within one deadline."""

import asyncio
import time
from collections.abc import Mapping

from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.http import ANSWER_BYTES_MAX, ProviderHttp, ProviderResponse
from payments.gateways.stripe_objects import error_of

KEY = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"  # the response is that of an earlier request with this key
BUSY_S = 0.1


class StripeCall:
    """`timeout_s` is for all of them together."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at = time.monotonic() + timeout_s
        self._asked = False

    async def exchange(
        self,
        http: ProviderHttp,
        method: str,
        path: str,
        form: Mapping[str, object] | None = None,
        *,
        key: str | None = None,
        bytes_max: int = ANSWER_BYTES_MAX,
    ) -> ProviderResponse:
        """Repeats the same bytes while Stripe is busy with the same key or object. NeverSent means
        that none of the exchanges was sent."""
        while True:
            try:
                response = await http.exchange(
                    method,
                    path,
                    timeout_s=self._left_s(),
                    headers={} if key is None else {KEY: key},
                    form=form,
                    response_headers=(KEY, REPLAYED),
                    response_bytes_max=bytes_max,
                )
            except NeverSent as unsent:
                if self._asked:
                    raise OutcomeUnknown(str(unsent), is_outage=unsent.is_outage) from None
                raise
            self._asked = True
            if response.headers.get(KEY, key) != key:
                raise OutcomeUnknown("Stripe responded to another request")
            error = error_of(response)
            if error is None or not error.is_busy or self._left_s() < 2 * BUSY_S:
                return response
            await asyncio.sleep(BUSY_S)

    def _left_s(self) -> float:
        return self._ends_at - time.monotonic()
