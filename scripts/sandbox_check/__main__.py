"""`python -m scripts.sandbox_check PROVIDER`; scripts/sandbox-check installs what it needs."""

import asyncio
import importlib
import os
import sys
from pathlib import Path

import click

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown
from payments.money import DECIMALS
from payments.setting_sources import read_settings
from scripts.sandbox_check import Options, Report

PROVIDERS = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


@click.command()
@click.argument("provider", type=click.Choice(PROVIDERS))
@click.argument("payment", required=False)
@click.option("--currency", default="USD", show_default=True, help="that the account can take")
@click.option("--webhooks", type=click.IntRange(1, 65535), help="port they are forwarded to")
def main(provider: str, payment: str | None, currency: str, webhooks: int | None) -> None:
    """Charges, declines and refunds in PROVIDER's test mode, and says what held.

    PAYMENT is what you paid or approved there as a customer, to be captured and refunded: an order
    of PayPal, or a pay_... of Razorpay.
    """
    if currency not in DECIMALS:
        raise click.BadParameter("must be a code of ISO 4217, as USD", param_hint="--currency")
    report = Report()
    try:
        settings = read_settings(os.environ)
        module = importlib.import_module(f"scripts.sandbox_check.{provider}")
        asyncio.run(module.check(settings, Options(currency, webhooks, payment), report))
    except StartError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except (OutcomeUnknown, NeverSent) as error:
        click.echo(f"{provider} gave no outcome: {error}", err=True)
        sys.exit(2)
    click.echo(f"{report.failed} did not hold" if report.failed else "all of it held")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
