"""Opaque page cursors: signed, so that a client can neither read meaning into them nor make its own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from service.errors import BadRequest

TAG_BYTES = 16


class Cursors:
    """Signs and reads cursors with one secret; a cursor of one list is refused by another.

    >>> cursors = Cursors(b"secret")
    >>> cursors.read("jobs", cursors.make("jobs", ["2026-01-01", "job_1"]))
    ['2026-01-01', 'job_1']
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, kind: str, position: Any) -> str:
        """The cursor behind the last item of a page."""
        payload = json.dumps([kind, position], separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._tag(payload) + payload).decode().rstrip("=")

    def read(self, kind: str, cursor: str) -> Any:
        """The inverse of `make`; raises BadRequest `invalid-cursor` for anything that this server did not
        make.
        """
        try:
            raw = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        except (ValueError, binascii.Error):
            raise _invalid(kind) from None
        tag, payload = raw[:TAG_BYTES], raw[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(payload)):
            raise _invalid(kind)
        made_for, position = json.loads(payload)
        if made_for != kind:
            raise _invalid(kind)
        return position

    def _tag(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, payload, hashlib.sha256)[:TAG_BYTES]


def load_secret(path: Path) -> bytes:
    """The secret of this data directory, made on first use and readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    if not path.exists():
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(draft, path)  # the first process wins, the others read its secret
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()


def _invalid(kind: str) -> BadRequest:
    return BadRequest(
        "invalid-cursor",
        f"cursor must be the next_cursor of a page of {kind}. Got another text. Start again without a "
        "cursor.",
        pointer="/query/cursor",
    )
