"""PayPal's webhooks: whether one is genuine, which PayPal is asked, and what it is about.

PayPal signs the bytes that it sent. They go back to it as they came, inside the question.
"""

import re
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from payments.gateways import BadSignature, Hint, ProviderFinding
from payments.gateways.http import ProviderResponse, decoded
from payments.gateways.paypal_orders import ORDER_ID, as_uuid

VERIFY_PATH = "/v1/notifications/verify-webhook-signature"
BODY_BYTES_MAX = 64 * 1024

# Each header, what it is called in the question, and how it looks.
_WORD = r"(?!\d+\Z)\w[!#-\[\]-~]"
_HEADERS = {
    "paypal-auth-algo": ("auth_algo", re.compile(r"[a-zA-Z0-9]{1,100}")),
    "paypal-cert-url": ("cert_url", re.compile(r"https://[!#-\[\]-~]{1,490}")),
    "paypal-transmission-id": ("transmission_id", re.compile(_WORD + "{1,49}", re.A)),
    "paypal-transmission-sig": ("transmission_sig", re.compile(_WORD + "{1,499}", re.A)),
    "paypal-transmission-time": (
        "transmission_time",
        re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.A),
    ),
}


class _Ids(msgspec.Struct, frozen=True):
    order_id: str = ""


class _Related(msgspec.Struct, frozen=True):
    related_ids: _Ids = _Ids()


class _Disputed(msgspec.Struct, frozen=True):
    custom: str = ""


class _Resource(msgspec.Struct, frozen=True):
    id: str = ""
    custom_id: str = ""
    supplementary_data: _Related = _Related()
    disputed_transactions: tuple[_Disputed, ...] = ()


class _Event(msgspec.Struct, frozen=True):
    """What it says of amounts and statuses is not read: it may be old or out of order."""

    id: str
    resource_type: str = ""
    resource: _Resource = _Resource()


class _Verified(msgspec.Struct, frozen=True):
    verification_status: str


class _Webhook(msgspec.Struct, frozen=True):
    url: str


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_EVENT = msgspec.json.Decoder(_Event)
_VERIFIED = msgspec.json.Decoder(_Verified)
_WEBHOOK = msgspec.json.Decoder(_Webhook)


def question(headers: Mapping[str, str], raw_body: bytes, webhook_id: str | None) -> msgspec.Raw:
    """The body of the question whether a webhook is genuine. Raises BadSignature for what PayPal
    need not be asked about."""
    if webhook_id is None:
        raise BadSignature("PAYPAL_WEBHOOK_ID is not set")
    fields = {"webhook_id": webhook_id}
    for name, (field, pattern) in _HEADERS.items():
        value = headers.get(name, "")
        if not pattern.fullmatch(value):
            raise BadSignature(f"the header {name} is missing or not well-formed")
        fields[field] = value
    # One whole JSON object: anything else would add fields of its own to the question.
    if len(raw_body) > BODY_BYTES_MAX or not _is_object(raw_body):
        raise BadSignature("the body is no event")
    told = msgspec.json.encode(fields)
    return msgspec.Raw(told[:-1] + b',"webhook_event":' + raw_body + b"}")


def _is_object(raw_body: bytes) -> bool:
    try:
        raw_body.decode()
    except UnicodeDecodeError:
        return False
    return decoded(raw_body, _OBJECT) is not None


def check(response: ProviderResponse) -> None:
    """Raises BadSignature unless PayPal says that it is genuine, or OutcomeUnknown."""
    if response.status == 400:
        raise BadSignature("the provider does not accept the signature's headers")
    if response.status != 200:
        response.unexpected()
    if response.read(_VERIFIED).verification_status != "SUCCESS":
        raise BadSignature("the signature is not the provider's")


def hint_of(raw_body: bytes) -> Hint | None:
    """What a genuine one is about."""
    event = decoded(raw_body, _EVENT)
    if event is None:
        return None
    resource = event.resource
    order_id = resource.supplementary_data.related_ids.order_id
    if event.resource_type == "checkout-order":
        order_id = resource.id
    if ORDER_ID.fullmatch(order_id):
        return Hint(event_id=event.id, reference=order_id)
    named = [each.custom for each in resource.disputed_transactions]
    if event.resource_type != "refund":  # which has the refund's id there
        named.append(resource.custom_id)
    for text in named:
        if (payment_id := as_uuid(text)) is not None:
            return Hint(event_id=event.id, payment_id=payment_id)
    return None


async def finding(
    ask: Callable[[str, str], Awaitable[ProviderResponse]], webhook_id: str | None
) -> ProviderFinding:
    """Whether PayPal knows the webhook that is configured."""
    if webhook_id is None:
        text = "no PAYPAL_WEBHOOK_ID: webhooks are rejected, settling asks without"
        return ProviderFinding(False, text)
    if not re.fullmatch(r"[a-zA-Z0-9]{1,50}", webhook_id):
        return ProviderFinding(True, "PAYPAL_WEBHOOK_ID is no id of a webhook: copy it again")
    response = await ask("GET", f"/v1/notifications/webhooks/{webhook_id}")
    if response.status in (400, 404):
        return ProviderFinding(
            True, "PAYPAL_WEBHOOK_ID names no webhook of this app: set it to the one of the app"
        )
    if response.status != 200:
        response.unexpected()
    return ProviderFinding(False, f"the webhook sends to {response.read(_WEBHOOK).url}")
