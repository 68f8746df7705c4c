"""Signatures, checked by the library that receivers use. It takes text: of bytes objects it would
sign their repr."""

import base64
import time
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from payments.order_service.signing import signature_headers
from payments.webhook_secrets import parse_secrets

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
MESSAGE_ID = "058c9593-e150-402f-ab5b-37dd4c9816f0"
BODY = '{"status":"SUCCESS","note":"Überweisung ₹"}'
TOLERANCE_S = 300


def headers_of(
    secrets: str, body: str = BODY, *, message_id: str = MESSAGE_ID, age_s: int = 0
) -> dict[str, str]:
    now = int(time.time()) - age_s
    return signature_headers(parse_secrets(secrets), message_id, now, body.encode())


def accepts(secret: str, body: str, headers: dict[str, str]) -> bool:
    try:
        Webhook(secret).verify(body, headers, json_parse=False)
    except WebhookVerificationError:
        return False
    return True


class TestSignatures:
    def test_the_headers(self) -> None:
        """The figures of a known case: openssl dgst -sha256 -mac HMAC says the same."""
        headers = signature_headers(
            parse_secrets(SECRET),
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
        )
        assert headers == {
            "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "webhook-timestamp": "1614265330",
            "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        }

    def test_a_receiver_accepts_them(self) -> None:
        assert accepts(SECRET, BODY, headers_of(SECRET))

    def test_a_receiver_with_another_secret_does_not(self) -> None:
        assert not accepts(OTHER, BODY, headers_of(SECRET))

    @pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
    def test_what_is_signed_cannot_be_changed(self, name: str) -> None:
        headers = headers_of(SECRET)
        assert not accepts(SECRET, BODY.replace("SUCCESS", "FAILED"), headers)
        changed = str(int(time.time()) + 1) if name == "webhook-timestamp" else "another"
        assert not accepts(SECRET, BODY, headers | {name: changed})

    @pytest.mark.parametrize("age_s", [-TOLERANCE_S - 5, TOLERANCE_S + 5])
    def test_a_receiver_refuses_a_time_that_is_too_far_off(self, age_s: int) -> None:
        assert not accepts(SECRET, BODY, headers_of(SECRET, age_s=age_s))

    @pytest.mark.parametrize("age_s", [-TOLERANCE_S + 5, TOLERANCE_S - 5])
    def test_the_timestamp_is_in_seconds(self, age_s: int) -> None:
        assert accepts(SECRET, BODY, headers_of(SECRET, age_s=age_s))

    def test_with_several_secrets_a_receiver_may_hold_any_of_them(self) -> None:
        headers = headers_of(f"{SECRET},{OTHER}")
        assert accepts(SECRET, BODY, headers)
        assert accepts(OTHER, BODY, headers)

    def test_the_first_secret_signs_first(self) -> None:
        def signature(secrets: str) -> str:
            headers = signature_headers(parse_secrets(secrets), MESSAGE_ID, 1614265330, b"{}")
            return headers["webhook-signature"]

        one, other, both = map(signature, (SECRET, OTHER, f"{OTHER},{SECRET}"))
        assert both == f"{other} {one}"

    @given(
        keys=st.lists(st.binary(min_size=12, max_size=80), min_size=1, max_size=4),
        message_id=st.uuids(version=4).map(str),
        body=st.text(st.characters(exclude_categories=["Cs"])),
    )
    def test_whatever_is_signed_is_accepted(
        self, keys: list[bytes], message_id: str, body: str
    ) -> None:
        secrets = [f"whsec_{base64.b64encode(key).decode()}" for key in keys]
        assert parse_secrets(",".join(secrets)) == tuple(keys)
        headers = headers_of(",".join(secrets), body, message_id=message_id)
        assert all(accepts(secret, body, headers) for secret in secrets)
        assert all(value.isascii() and value.isprintable() for value in headers.values())


class TestSecrets:
    def test_padding_may_be_left_out(self) -> None:
        padded = "whsec_" + base64.b64encode(b"x" * 25).decode()
        assert padded.endswith("==")
        assert parse_secrets(padded) == parse_secrets(padded.rstrip("=")) == (b"x" * 25,)

    def test_there_may_be_spaces_behind_a_comma(self) -> None:
        assert parse_secrets(f"{SECRET},  {OTHER}") == parse_secrets(f"{SECRET},{OTHER}")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            ",",
            "whsec_",
            "canary5ecretcanary5ecret",
            "WHSEC_canary5ecretcanary5ecret",
            "whsec_canary5ecret",
            "whsec_canary5ecret canary5ecret",
            "whsec_canary5ecret-canary5ecret_",
            "whsec_canary5ecretcanary5ecret===",
            "whsec_canary5ecretcanary5ecret1\n",
            "whsec_canary5ecretcanary5ecret12345",
            "whsec_canary5ecrétcanary5ecrét",
            f"{SECRET},",
            f",{SECRET}",
            f"{SECRET},whsec_canary5ecret",
            f"{SECRET} ,{SECRET}",
        ],
    )
    def test_anything_else_is_refused_and_not_repeated(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be whsec_") as raised:
            parse_secrets(text)
        told = "".join(traceback.format_exception(raised.value))
        assert "canary" not in told
        assert SECRET[6:] not in told
