"""Whether each provider's account is the one that this database's payments are in. The table
provider_accounts, and all of its SQL.

Another account knows nothing of what was captured: asked about it, it would say "not found".
"""

import asyncio
import os
import signal
from datetime import datetime
from typing import NamedTuple

from loguru import logger

from payments.database.connections import Database
from payments.errors import DatabaseUnavailable, StartError
from payments.gateways import Gateway, NeverSent, OutcomeUnknown
from payments.gateways.chosen import Gateways
from payments.tasks import end

TIMEOUT_S = 5.0
AGAIN_S = 30.0  # when a provider could not be asked at the start

KNOWN = """
SELECT account FROM provider_accounts WHERE gateway = %(gateway)s
"""

MAKE_KNOWN = """
INSERT INTO provider_accounts (gateway, account) VALUES (%(gateway)s, %(account)s)
    ON CONFLICT DO NOTHING RETURNING account
"""

ALL_KNOWN = """
SELECT gateway, account, noted_at FROM provider_accounts ORDER BY gateway
"""

# For operators, who type it between double quotes; names are plain (building.py).
FORGET = "DELETE FROM provider_accounts WHERE gateway = '{}'"


class KnownAccount(NamedTuple):
    """The account in which this database's payments of a provider are."""

    gateway: str
    account: str
    noted_at: datetime


async def known_accounts(database: Database) -> list[KnownAccount]:
    return [KnownAccount(*row) for row in await database.fetch(ALL_KNOWN)]


class Accounts:
    """One per process."""

    def __init__(self, gateways: Gateways[Gateway], database: Database) -> None:
        self._gateways = gateways
        self._database = database
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Asks all providers; those that do not say it are asked again later. Raises StartError for
        another account, or DatabaseUnavailable."""
        silent = [each for each in self._gateways if not await self._check(each)]
        if silent:
            self._task = asyncio.create_task(self._go_on(silent), name="accounts")

    async def stop(self) -> None:
        if self._task is not None:
            await end({self._task}, 1)

    async def _check(self, gateway: Gateway) -> bool:
        """Whether it could be asked. The first account becomes the known one."""
        try:
            account = await gateway.account(TIMEOUT_S)
        except (OutcomeUnknown, NeverSent) as error:
            message = "the provider does not say whose account it is; it is asked again"
            logger.bind(gateway=gateway.name, reason=str(error)).warning(message)
            return False
        if account is None:
            return True
        asked = {"gateway": gateway.name, "account": account}
        known = await self._database.fetch(KNOWN, asked)
        if not known:
            made = await self._database.fetch(MAKE_KNOWN, asked)
            known = made or await self._database.fetch(KNOWN, asked)
        if known != [(account,)]:
            raise StartError(
                f"the provider {gateway.name} has another account than the one in which this "
                f"database's payments are: put its credentials (or, simulated, its ledger) right; "
                f'`payments psql -c "{FORGET.format(gateway.name)}"` accepts the new one, and '
                "nothing of what the former one captured can be found or refunded any more"
            )
        return True

    async def _go_on(self, silent: list[Gateway]) -> None:
        while silent:
            await asyncio.sleep(AGAIN_S)
            try:
                silent = [each for each in silent if not await self._check(each)]
            except DatabaseUnavailable:
                continue
            except StartError as error:
                # When it is started again, it is refused.
                logger.critical("{}; the service stops", error)
                os.kill(os.getpid(), signal.SIGTERM)
                return
