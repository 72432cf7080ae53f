"""Identifiers: a word for the kind, then a UUID of version 7, which sorts by time of birth."""

import os
import time
import uuid


def uuid7() -> uuid.UUID:
    """A version 7 UUID (RFC 9562): 48 bits of milliseconds, 12 bits of the millisecond's fraction, 62
    random bits.

    `uuid.uuid7` exists only from Python 3.14 on.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    fraction = rest * 4096 // 1_000_000
    random_bits = int.from_bytes(os.urandom(8), "big") & (2**62 - 1)
    return uuid.UUID(
        int=(milliseconds & (2**48 - 1)) << 80 | 7 << 76 | fraction << 64 | 2 << 62 | random_bits
    )


def new_id(kind: str) -> str:
    """A fresh identifier, for example ``new_id("job")`` -> ``job_0199...`` (32 hexadecimal digits)."""
    return f"{kind}_{uuid7().hex}"
