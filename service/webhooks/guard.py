"""Where webhooks and questions to hubs may go: public addresses, checked when the connection is made, against
server-side request forgery.

A name is resolved once, every address that it has is checked, and the connection goes to a checked address: a
name that resolves to something else a moment later changes nothing. TLS still checks the name.
"""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]

PORTS = (443, 8443)
LONGEST_URL = 2000
HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""NAT64: the last four bytes are the IPv4 address that is reached."""
SPECIAL: tuple[Network, ...] = (
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv6Network("2001::/23"),
    ipaddress.IPv6Network("2002::/16"),
    ipaddress.IPv6Network("3fff::/20"),
)
"""Of protocols, tunnels and documentation, which `is_global` of some Python versions lets through."""


class DestinationRefused(ValueError):
    """A webhook, or a question to a hub, must not go there."""


class NameNotFound(OSError):
    """The receiver's name has no address."""


@dataclass(frozen=True)
class Destination:
    """A webhook's URL, taken apart once: `host` is a name or a literal address, `authority` the Host header,
    `target` path and query.
    """

    tls: bool
    host: str
    port: int
    authority: str
    target: str


def parse_destination(url: str, longest: int = LONGEST_URL) -> Destination:
    """The parts of an http or https URL of at most `longest` characters. Raises `DestinationRefused`."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
        host, authority = parsed.raw_host.decode("ascii"), parsed.netloc.decode("ascii")
        tls = parsed.scheme == "https"
        port = (443 if tls else 80) if parsed.port is None else parsed.port
    except (httpx2.InvalidURL, UnicodeError, TypeError, ValueError):
        raise _no_url("something else", longest) from None
    if len(url) > longest:
        raise _no_url(f"one of {len(url)} characters", longest)
    if parsed.scheme not in ("http", "https") or not HOST.fullmatch(host) or not 0 < port < 2**16:
        raise _no_url(f"scheme {parsed.scheme[:20]!r}, host {host[:80]!r} and port {port}", longest)
    if parsed.userinfo or parsed.fragment:
        raise _no_url("one with a user, a password or a fragment", longest)
    return Destination(tls, host, port, authority, parsed.raw_path.decode("ascii"))


def _no_url(got: str, longest: int) -> DestinationRefused:
    return DestinationRefused(
        f"A URL must be https://host/path of at most {longest} characters, without a user or fragment. Got"
        f" {got}. Correct it."
    )


def is_public(address: Address) -> bool:
    """Whether anybody on the internet may be there: no private, local, shared, multicast or special address,
    also inside IPv6.

    >>> [is_public(ipaddress.ip_address(text)) for text in ("93.184.216.34", "10.0.0.1", "::ffff:10.0.0.1")]
    [True, False, False]
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if address in TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in GLOBAL_UNICAST:
            return False
    if any(address in network for network in SPECIAL if network.version == address.version):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses that a name has now. Raises `NameNotFound`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NameNotFound(f"no address for {host[:80]!r}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Guard:
    """The rules: public addresses, TLS and the ports 443 and 8443; anything goes inside `networks`, which the
    operator has allowed.
    """

    networks: tuple[Network, ...] = ()
    resolve: Resolve = resolved

    @classmethod
    def of(cls, networks: Iterable[str]) -> Guard:
        """From networks as settings spell them ("10.0.0.0/8"). Raises ValueError."""
        return cls(tuple(ipaddress.ip_network(network) for network in networks))

    def check(self, destination: Destination) -> None:
        """What can be told without asking for addresses. Raises `DestinationRefused`."""
        try:
            literal = ipaddress.ip_address(destination.host)
        except ValueError:
            if not self.networks:
                self._check_name(destination)
            return
        self._check(destination, literal)

    def addresses(self, destination: Destination) -> Sequence[str]:
        """The addresses to connect to, every one of them checked. Raises `DestinationRefused` if one is not
        allowed, and `NameNotFound`.
        """
        found = [text.partition("%")[0] for text in self.resolve(destination.host, destination.port)]
        for text in found:
            self._check(destination, ipaddress.ip_address(text))
        return found

    def _check_name(self, destination: Destination) -> None:
        name = destination.host.rstrip(".").lower()
        if name == "localhost" or name.endswith(".localhost"):
            raise _not_public(destination)
        _require_tls(destination)

    def _check(self, destination: Destination, address: Address) -> None:
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(plain in network for network in self.networks if network.version == plain.version):
            return
        if not is_public(address):
            raise _not_public(destination)
        _require_tls(destination)


def _require_tls(destination: Destination) -> None:
    if not destination.tls:
        raise DestinationRefused("A URL must begin with https://. Got http://. Use TLS.")
    if destination.port not in PORTS:
        ports = " or ".join(map(str, PORTS))
        raise DestinationRefused(
            f"The port of a URL must be {ports}. Got {destination.port}. Let the server listen there."
        )


def _not_public(destination: Destination) -> DestinationRefused:
    """In words that do not say which address it was: the sender of a job is not to learn of the server's
    network.
    """
    return DestinationRefused(
        f"A webhook's host must have public addresses only. Got {destination.host[:80]!r}, which has another."
        " Use a public receiver; the operator may allow networks with BITPLAN_WEBHOOK_NETWORKS."
    )
