"""HTTP to a provider that wants a bearer token, which it gives for the client's credentials.

One token is shared by all exchanges and kept until shortly before it expires. However many need a
new one at once, one is asked for. A token that cannot be had means that the exchange was never
sent. Neither token nor secret is in an error.
"""

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.observability.logs import Repeats

TIMEOUT_S = 5.0  # of the token request, which outlives the exchange that began it
MARGIN_S = 60.0  # a token is given up so long before it expires, or after nine tenths of its time

REJECTED = "the provider rejects the client id and secret, and gives no access token"

_TOKEN = re.compile(r"[\x21-\x7e]+")


class _Granted(msgspec.Struct, frozen=True):
    access_token: str
    expires_in: float


class _Token(NamedTuple):
    header: str
    until: float


_GRANTED = msgspec.json.Decoder(_Granted)


class OAuthHttp:
    """Exchanges with one provider, each with a token of `token_path`."""

    def __init__(
        self,
        http: ProviderHttp,
        token_path: str,
        client_id: str,
        client_secret: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        credentials = b64encode(f"{client_id}:{client_secret}".encode()).decode()
        self._http = http
        self._token_path = token_path
        self._basic = {"authorization": f"Basic {credentials}"}
        self._clock = clock
        self._token: _Token | None = None
        self._asking: asyncio.Task[_Token | NeverSent] | None = None
        self._repeats = Repeats()

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        body: object = None,
    ) -> ProviderResponse:
        """As ProviderHttp.exchange. A response of 401 did nothing: the request is sent once more,
        with a new token."""
        ends = time.monotonic() + timeout_s
        for attempt in range(2):
            token = await self._valid_token(ends - time.monotonic())
            response = await self._http.exchange(
                method,
                path,
                timeout_s=ends - time.monotonic(),
                headers={**(headers or {}), "authorization": token.header},
                body=body,
            )
            if response.status != 401 or attempt:
                break
            if self._token is token:  # else another exchange has a newer one already
                self._token = None
        return response

    async def check(self, timeout_s: float) -> None:
        """Raises NeverSent if there is no token to be had."""
        await self._valid_token(timeout_s)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        await self._http.close()

    async def _valid_token(self, timeout_s: float) -> _Token:
        """Raises NeverSent."""
        if self._token is not None and self._clock() < self._token.until:
            return self._token
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="access token")
        done, _ = await asyncio.wait({self._asking}, timeout=max(0.0, timeout_s))
        if not done:
            raise NeverSent("no access token in time", is_outage=timeout_s > 0)
        closed = self._asking.cancelled()
        outcome = NeverSent("closed", is_outage=False) if closed else self._asking.result()
        if isinstance(outcome, NeverSent):
            raise NeverSent(str(outcome), is_outage=outcome.is_outage)
        return outcome

    async def _ask(self) -> _Token | NeverSent:
        """The failure is returned, since nobody may be left to whom it could be raised."""
        asked_at = self._clock()
        try:
            response = await self._http.exchange(
                "POST",
                self._token_path,
                timeout_s=TIMEOUT_S,
                headers=self._basic,
                form={"grant_type": "client_credentials"},
            )
            if response.status in (400, 401, 403):
                self._repeats.tell("ERROR", REJECTED, provider=repr(self._http))
                return NeverSent(REJECTED, is_outage=False)
            if response.status != 200:
                response.unexpected()
            granted = response.read(_GRANTED)
        except (OutcomeUnknown, NeverSent) as error:
            return NeverSent(f"no access token: {error}", is_outage=error.is_outage)
        if not _TOKEN.fullmatch(granted.access_token) or granted.expires_in <= 0:
            return NeverSent("no access token: an unusable one", is_outage=False)
        kept_s = granted.expires_in - min(MARGIN_S, granted.expires_in / 10)
        self._token = _Token(f"Bearer {granted.access_token}", asked_at + kept_s)
        return self._token
