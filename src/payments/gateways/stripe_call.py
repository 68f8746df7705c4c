"""The exchanges of one call of the gateway to Stripe, within one deadline."""

from collections.abc import Mapping

from payments.gateways import OutcomeUnknown
from payments.gateways.adapters import Exchanges
from payments.gateways.http import ANSWER_BYTES_MAX, ProviderHttp, ProviderResponse
from payments.gateways.stripe_objects import error_of

KEY = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"  # the response is that of an earlier request with this key
BUSY_S = 0.1


class StripeCall:
    """`timeout_s` is for all of them together."""

    def __init__(self, timeout_s: float) -> None:
        self._exchanges = Exchanges(timeout_s)

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

        async def once(left_s: float) -> ProviderResponse:
            response = await http.exchange(
                method,
                path,
                timeout_s=left_s,
                headers={} if key is None else {KEY: key},
                form=form,
                response_headers=(KEY, REPLAYED),
                response_bytes_max=bytes_max,
            )
            if response.headers.get(KEY, key) != key:
                raise OutcomeUnknown("Stripe responded to another request")
            return response

        return await self._exchanges.repeated(once, _is_busy, BUSY_S)


def _is_busy(response: ProviderResponse) -> bool:
    error = error_of(response)
    return error is not None and error.is_busy
