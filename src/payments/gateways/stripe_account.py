"""Stripe: the settings, what `payments doctor` says of the account, and which charges it takes."""

import re

from payments.errors import StartError
from payments.gateways import ProviderCharge, ProviderFinding, Refusal
from payments.gateways.http import ProviderResponse
from payments.gateways.stripe_objects import (
    ACCOUNT,
    Mode,
    StripeAccount,
    error_of,
    mode_of,
    unexpected,
)
from payments.gateways.units import STRIPE_MAX, to_stripe
from payments.settings import Settings

CONFIRMATION_TOKEN = "ctoken_"  # noqa: S105 - how its id begins
_METHOD = re.compile(rf"(pm_|{CONFIRMATION_TOKEN})[A-Za-z0-9_]{{1,240}}")
_ACCOUNT_ID = re.compile(r"\bacct_[A-Za-z0-9]+\b")

# Of our currencies, those that docs.stripe.com/currencies does not list.
_NO_CURRENCIES = (
    "BOV BTN CHE CHW CLF COU CUP ERN GHS IQD IRR KPW LYD MRU MXV SDG SSP STN SVC SYP TMT USN UYI "
    "UYW VED VES XAD ZWG"
)


def checked_key(settings: Settings) -> tuple[str, Mode]:
    """The API key and its mode. Raises StartError for settings that do not fit."""
    key = settings.stripe_secret_key
    if key is None:
        raise StartError("STRIPE_SECRET_KEY must be set for the provider stripe")
    mode = mode_of(key, ("sk", "rk"))
    if mode is None:
        raise StartError(
            "STRIPE_SECRET_KEY must be a secret or restricted key of Stripe: it begins with "
            "sk_test_, sk_live_, rk_test_ or rk_live_"
        )
    publishable = settings.stripe_publishable_key
    if publishable is not None and mode_of(publishable, ("pk",)) != mode:
        raise StartError(
            f"STRIPE_PUBLISHABLE_KEY must begin with pk_{mode}_, as STRIPE_SECRET_KEY is a key of "
            f"the {mode} mode"
        )
    if not all(each.startswith("whsec_") for each in settings.stripe_webhook_secrets):
        raise StartError(
            "STRIPE_WEBHOOK_SECRETS must hold signing secrets, which begin with whsec_"
        )
    return key, mode


def account_of(response: ProviderResponse) -> StripeAccount | None:
    """None for a restricted key that cannot read it, and is not told its id either."""
    if response.status == 200:
        return response.read(ACCOUNT)
    error = error_of(response)
    if response.status != 403 or error is None:
        unexpected(response)
    named = _ACCOUNT_ID.search(error.message or "")
    return None if named is None else StripeAccount(id=named[0])


def findings_of(
    mode: Mode,
    account: ProviderResponse,
    intents: ProviderResponse,
    has_webhooks: bool,
    has_publishable_key: bool,
) -> list[ProviderFinding]:
    found = [_key(mode, intents)]
    if intents.status == 200:
        found.append(_charges(account))
    text = "webhooks are verified with STRIPE_WEBHOOK_SECRETS"
    if not has_webhooks:
        text = "no STRIPE_WEBHOOK_SECRETS: webhooks are rejected, settling asks without"
    found.append(ProviderFinding(False, text))
    text = "customers act in Stripe.js, with STRIPE_PUBLISHABLE_KEY"
    if not has_publishable_key:
        text = "no STRIPE_PUBLISHABLE_KEY: customers are redirected for 3-D Secure"
    found.append(ProviderFinding(False, text))
    return found


def _key(mode: Mode, intents: ProviderResponse) -> ProviderFinding:
    match intents.status:
        case 200:
            return ProviderFinding(False, f"the API key is of the {mode} mode")
        case 401:
            return ProviderFinding(True, "the API key is rejected: put STRIPE_SECRET_KEY right")
        case 403:
            text = "the restricted key cannot read PaymentIntents: let it write them, and refunds"
            return ProviderFinding(True, text)
    return unexpected(intents)


def _charges(response: ProviderResponse) -> ProviderFinding:
    if response.status == 403:
        return ProviderFinding(False, "the restricted key cannot read the account")
    account = account_of(response)
    if account is None or not account.charges_enabled:
        text = "the account cannot charge: complete it in Stripe's dashboard"
        return ProviderFinding(True, text)
    return ProviderFinding(False, f"the account {account.id} can charge")


def refusal_of(charge: ProviderCharge) -> Refusal | None:
    """Why Stripe takes no such charge, as far as that is known without asking."""
    if charge.currency in _NO_CURRENCIES.split():
        return Refusal("currency", "must be a currency that Stripe charges in")
    try:
        amount = to_stripe(charge.amount_cents, charge.currency)
    except ValueError as error:
        return Refusal("amount_cents", str(error))
    if amount > STRIPE_MAX:
        return Refusal("amount_cents", "must have at most 12 digits in the units of Stripe")
    if charge.payment_method is None:
        message = "must be given: the id of a PaymentMethod that Stripe.js made, as in pm_..."
        return Refusal("payment_method", message)
    if not _METHOD.fullmatch(charge.payment_method):
        message = "must be the id of a PaymentMethod (pm_...) or a confirmation token (ctoken_...)"
        return Refusal("payment_method", message)
    return None
