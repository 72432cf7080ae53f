"""Signatures: the published example, and everything that a receiver must refuse."""

from __future__ import annotations

import base64

import pytest

from service.webhooks.signing import PREFIX, SignatureError, key_of, new_secret, signature, verify

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
ID, TIME = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330


def headers(**changes: str) -> dict[str, str]:
    made = {
        "Webhook-Id": ID,
        "Webhook-Timestamp": str(TIME),
        "Webhook-Signature": signature(SECRET, ID, TIME, BODY),
    }
    return made | {name.replace("_", "-").title(): value for name, value in changes.items()}


def test_the_example_of_the_standard() -> None:
    assert signature(SECRET, ID, TIME, BODY) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_was_signed_is_verified() -> None:
    assert verify(SECRET, headers(), BODY, now=TIME + 299) == {"test": 2432232314}
    several = f"v1,AAAA v2,zzzz {headers()['Webhook-Signature']}"
    assert verify(SECRET, headers(webhook_signature=several), BODY, now=TIME)


def test_a_fresh_secret_works_with_the_clock() -> None:
    import time

    secret, now = new_secret(), int(time.time())
    made = {
        "webhook-id": "m",
        "webhook-timestamp": str(now),
        "webhook-signature": signature(secret, "m", now, b"{}"),
    }
    assert len(key_of(secret)) == 32
    assert verify(secret, made, b"{}") == {}


@pytest.mark.parametrize(
    ("changes", "body", "now", "words"),
    [
        ({}, BODY + b" ", TIME, "signed with your secret"),
        ({"webhook_id": "msg_other"}, BODY, TIME, "signed with your secret"),
        ({"webhook_timestamp": str(TIME + 1)}, BODY, TIME, "signed with your secret"),
        ({"webhook_signature": "v1,"}, BODY, TIME, "signed with your secret"),
        ({"webhook_signature": ""}, BODY, TIME, "signed with your secret"),
        ({"webhook_signature": "v1,é"}, BODY, TIME, "signed with your secret"),
        ({}, BODY, TIME + 301, "301 s old"),
        ({}, BODY, TIME - 301, "-301 s old"),
        ({"webhook_timestamp": "soon"}, BODY, TIME, "must have the headers"),
    ],
)
def test_anything_else_is_refused(changes: dict[str, str], body: bytes, now: int, words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        verify(SECRET, headers(**changes), body, now=now)


def test_another_secret_and_missing_headers_are_refused() -> None:
    with pytest.raises(SignatureError, match="signed with your secret"):
        verify(new_secret(), headers(), BODY, now=TIME)
    with pytest.raises(SignatureError, match="must have the headers"):
        verify(SECRET, {}, BODY, now=TIME)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "hunter2hunter2hunter2hunter2hunter2",
        PREFIX,
        PREFIX + "not base64!!",
        PREFIX + base64.b64encode(bytes(23)).decode(),
        PREFIX + base64.b64encode(bytes(65)).decode(),
    ],
)
def test_a_secret_that_is_none_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="must be whsec_ and then 24 to 64 random bytes") as caught:
        key_of(secret)
    assert not secret.removeprefix(PREFIX) or secret not in str(caught.value)
