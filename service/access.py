"""Who may do what: scopes, keys, and what is kept of a key."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

KEY_MARK = "bitplan_"
"""How every key begins."""
TOKEN = re.compile(r"bitplan_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_LIKELY = re.compile(r"(bitplan_[0-9a-f]{12}_)[A-Za-z0-9_-]+")
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
LOCAL_TENANT = "default"
"""Whose things are those of requests without a key."""


class Scope(StrEnum):
    """What a key may do; each scope holds the ones before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def allows(self, needed: Scope) -> bool:
        """Whether a key of this scope may do what needs `needed`.

        >>> Scope.SUBMIT.allows(Scope.READ), Scope.READ.allows(Scope.SUBMIT)
        (True, False)
        """
        order = list(Scope)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Access:
    """Whose request it is; without `key_id` it is one that needed no key."""

    tenant: str = LOCAL_TENANT
    scope: Scope = Scope.ADMIN
    key_id: str | None = None


@dataclass(frozen=True)
class NewKey:
    """A key that was just made. The service keeps `prefix` and `digest`; `token` is shown once."""

    token: str
    prefix: str
    digest: str


def new_key() -> NewKey:
    """A random key: 48 bits that name it, 256 bits that nobody can guess.

    >>> key = new_key()
    >>> prefix_of(key.token) == key.prefix, digest_of(key.token) == key.digest
    (True, True)
    """
    prefix = secrets.token_hex(6)
    token = f"bitplan_{prefix}_{secrets.token_urlsafe(32)}"
    return NewKey(token, prefix, digest_of(token))


def digest_of(token: str) -> str:
    """What is kept of a key. It is random and long, so a fast hash cannot be reversed."""
    return hashlib.sha256(token.encode()).hexdigest()


def prefix_of(token: str) -> str | None:
    """The part that names the key; None for what has not the form of one."""
    found = TOKEN.fullmatch(token)
    return found and found[1]


def redacted(text: str) -> str:
    """The text with the secret of every key in it left out.

    >>> redacted("GET /?k=bitplan_0123456789ab_abc-DEF HTTP/1.1")
    'GET /?k=bitplan_0123456789ab_[redacted] HTTP/1.1'
    """
    return _LIKELY.sub(r"\1[redacted]", text)


def check_tenant(name: str) -> str:
    """The name of a tenant, which is a folder in the store too. Raises ValueError.

    >>> check_tenant("vision-team")
    'vision-team'
    """
    if not _TENANT.fullmatch(name):
        raise ValueError(
            "A tenant must be 1 to 64 lowercase letters, digits, - and _, the first a letter or digit. "
            f"Got {name[:80]!r}. Use for example vision-team."
        )
    return name


def is_local_host(host: str) -> bool:
    """Whether a host name or address can only be this machine.

    >>> is_local_host("localhost"), is_local_host("::ffff:127.0.0.1"), is_local_host("example.org")
    (True, True, False)
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
