"""Take a webhook of a payment provider: make the payment that it is about due now.

Nothing is decided from what it says; settling asks the provider. Why: docs/decisions/providers.md.
"""

from collections.abc import Iterable, Mapping

import msgspec

from payments import hints
from payments.database.connections import Database, DatabaseAddress
from payments.errors import (
    BadWebhookSignature,
    GatewayUnavailable,
    PaymentsError,
    TooBusy,
)
from payments.gateways import BadSignature, Hint, NeverSent, OutcomeUnknown
from payments.gateways.counted import CountedGateway, HintCall
from payments.hints import RecordedHint
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.settings import Settings

# With the database's time it ends within 5 s, after which providers take a delivery for failed.
HINT_TIMEOUT_S = 2.0
# At each provider, which may have to be called to verify one.
CALLS_MAX = 16
# Of their own, from the first one on: they wait for nothing else that is under way, and nothing
# waits for them.
CONNECTIONS_MAX = 2


class Hints:
    """Takes the webhooks of all providers that send some. One per process."""

    def __init__(
        self,
        gateways: Iterable[CountedGateway],
        address: DatabaseAddress,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._sources = {
            gateway.name: _Source(gateway.name, gateway.hint, telemetry)
            for gateway in gateways
            if gateway.hint is not None
        }
        self._database = Database(address, CONNECTIONS_MAX)
        self._is_open = False
        self._request_s = settings.charge_deadline_s

    async def close(self) -> None:
        await self._database.close()

    @property
    def names(self) -> frozenset[str]:
        """Of the providers that send webhooks."""
        return frozenset(self._sources)

    async def take(self, gateway: str, headers: Mapping[str, str], raw_body: bytes) -> RecordedHint:
        """Durable when it returns. `gateway` is one of `names`; the names of `headers` are in lower
        case.

        Raises BadWebhookSignature; or, so that the provider delivers it again, TooBusy,
        GatewayUnavailable or DatabaseUnavailable.
        """
        source = self._sources[gateway]
        try:
            hint = await source.read(headers, raw_body)
            taken = (
                RecordedHint("ignored", None) if hint is None else await self._record(source, hint)
            )
        except PaymentsError as error:
            bad = isinstance(error, BadWebhookSignature)
            source.counters["bad_signature" if bad else "unavailable"].inc()
            raise
        source.counters[taken.result].inc()
        return taken

    async def _record(self, source: "_Source", hint: Hint) -> RecordedHint:
        if not self._is_open:
            self._is_open = True
            await self._database.open()
        fields = msgspec.structs.asdict(hint)
        return await hints.record(self._database, source.name, fields, self._request_s)


class _Source:
    """A provider that sends webhooks."""

    def __init__(self, name: str, hint: HintCall, telemetry: Telemetry) -> None:
        self.name = name
        self.counters = telemetry.hints_of_gateway(name)
        self._hint = hint
        self._calls = 0
        self._repeats = Repeats()

    async def read(self, headers: Mapping[str, str], raw_body: bytes) -> Hint | None:
        if self._calls >= CALLS_MAX:
            raise TooBusy("The limit of concurrent webhooks of this provider is reached.")
        self._calls += 1
        try:
            return await self._hint(headers, raw_body, HINT_TIMEOUT_S)
        except BadSignature:
            message = "a webhook has no valid signature of its provider"
            self._repeats.tell("WARNING", message, gateway=self.name)
            detail = "The signature is missing, wrong or too old. Correct the webhook's secret."
            raise BadWebhookSignature(detail) from None
        except (OutcomeUnknown, NeverSent) as error:
            message = "a webhook cannot be verified now"
            self._repeats.tell("WARNING", message, gateway=self.name, reason=str(error))
            raise GatewayUnavailable("The webhook cannot be verified now. Retry.") from None
        finally:
            self._calls -= 1
