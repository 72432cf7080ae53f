"""Signatures of webhooks (Standard Webhooks 1.0, https://www.standardwebhooks.com): HMAC-SHA256 over id, time
and body.

A receiver checks what it was sent:

    from service.webhooks.signing import verify

    message = verify(secret, request.headers, request.body)   # raises SignatureError
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

PREFIX = "whsec_"
SHORTEST, LONGEST = 24, 64
TOLERANCE_SECONDS = 300


class SignatureError(ValueError):
    """The message was not signed with this secret, not now, or not at all."""


def new_secret() -> str:
    """A fresh secret of 32 random bytes, to be known to sender and receiver only."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def key_of(secret: str) -> bytes:
    """The bytes of a secret. Raises ValueError, without the secret in its words."""
    try:
        if not secret.startswith(PREFIX):
            raise ValueError
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
        if not SHORTEST <= len(key) <= LONGEST:
            raise ValueError
    except (binascii.Error, ValueError):
        raise ValueError(
            f"A webhook's secret must be {PREFIX} and then {SHORTEST} to {LONGEST} random bytes in base64."
            ' Got something else. Make one: python -c "from service.webhooks.signing import new_secret;'
            ' print(new_secret())".'
        ) from None
    return key


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` of a message; `timestamp` is in seconds since 1970.

    >>> signature("whsec_" + "AAAA" * 8, "msg_1", 1700000000, b"{}")
    'v1,LzeNxZHo3O8fwpFJpLh/0B99ugILNFJw+/9lTgx0APs='
    """
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(key_of(secret), signed, hashlib.sha256)).decode()


def verify(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    tolerance_seconds: float = TOLERANCE_SECONDS,
    now: float | None = None,
) -> dict[str, Any]:
    """The JSON of a message whose signature is right and whose time is within the tolerance of `now` (seconds
    since 1970; the clock's when left out).

    The same message may come more than once: remember `webhook-id`. Raises `SignatureError`, and ValueError
    for a secret that is none.
    """
    given = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, moment, signatures = (
            given[name] for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
        )
        timestamp = int(moment)
    except (KeyError, ValueError):
        raise SignatureError(
            "A webhook must have the headers webhook-id, webhook-timestamp and webhook-signature. Got one"
            " without. Refuse it."
        ) from None
    present = time.time() if now is None else now
    if abs(present - timestamp) > tolerance_seconds:
        raise SignatureError(
            f"A webhook must be from within {tolerance_seconds:g} s of now. Got one that is"
            f" {present - timestamp:.0f} s old. Refuse it, and check the clocks."
        )
    expected = signature(secret, message_id, timestamp, body).encode()
    if not any(hmac.compare_digest(expected, one.encode()) for one in signatures.split()):
        raise SignatureError(
            "A webhook must be signed with your secret. Got another signature. Refuse it; check the secret."
        )
    found: dict[str, Any] = json.loads(body)
    return found
