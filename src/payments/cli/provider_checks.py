"""The checks of `payments doctor` for the providers themselves: what their gateways find there."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from payments.cli.checks import Check, failing
from payments.gateways import CheckedGateway, Gateway, NeverSent, OutcomeUnknown

TIMEOUT_S = 5.0  # for each call that a gateway makes
WHOLE_TIMEOUT_S = 15.0  # for all of one gateway's
CLOSE_TIMEOUT_S = 2.0
NEXT = "check the network, its key and its status page: docs/gateways.md"


async def gateway_checks(gateways: Sequence[Gateway]) -> list[Check]:
    """A line for each finding of the gateways that have a check. All are closed afterwards."""
    checked = [cast(CheckedGateway, each) for each in gateways if hasattr(each, "findings")]
    try:
        found = await asyncio.gather(*map(_of, checked))
    finally:
        with suppress(Exception):  # nothing depends on it: the process ends
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*(each.close() for each in gateways), return_exceptions=True)
    return [check for checks in found for check in checks]


async def _of(gateway: CheckedGateway) -> list[Check]:
    """A defect is told without its message, which may hold a secret."""
    try:
        async with asyncio.timeout(WHOLE_TIMEOUT_S):
            findings = await gateway.findings(TIMEOUT_S)
            return [
                failing("gateway", each.bad, f"{gateway.name}: {each.text}") for each in findings
            ]
    except (OutcomeUnknown, NeverSent) as error:
        text = f"it cannot be asked: {error}: {NEXT}"
    except TimeoutError:
        text = f"it did not respond within {WHOLE_TIMEOUT_S:g} s: {NEXT}"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with somebody else's gateway
        text = f"its gateway failed with {type(error).__name__}, a defect of it: docs/gateways.md"
    return [Check(state="FAIL", name="gateway", text=f"{gateway.name}: {text}")]
