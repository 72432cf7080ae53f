"""Where a hub is, and which other hosts its files may come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from service.errors import Unprocessable
from service.settings import HUB_ENDPOINT, Settings
from service.webhooks.guard import Destination, DestinationRefused, Guard, parse_destination

LONGEST_LINK = 8000
"""Characters of a signed link to a content delivery network."""


@dataclass(frozen=True)
class HubPlace:
    """A hub: `endpoint` without a slash at its end, the `token` that goes there alone, and `hosts`.

    The well-known endpoint, and hosts that a pattern such as *.hf.co of `hosts` matches, must be public and
    speak TLS. An endpoint of the operator's, and hosts that `hosts` spells out (with a port, if it is not
    that of the scheme), may be anywhere. No other host is ever asked.
    """

    endpoint: str
    hosts: tuple[str, ...] = ()
    token: str = field(default="", repr=False)
    guard: Guard = field(default_factory=Guard)

    def destination(self, url: str) -> Destination:
        """The checked parts of a URL of the hub's or of its redirects. Raises `DestinationRefused`."""
        found = parse_destination(url, LONGEST_LINK)
        if not self._is_trusted(found):
            if not self.is_hub(found) and not any(fnmatchcase(found.host, host) for host in self.hosts):
                raise DestinationRefused(f"a link to {found.host[:80]!r}, which is no host of the hub's")
            self.guard.check(found)
        return found

    def addresses(self, destination: Destination) -> Sequence[str]:
        """The addresses to connect to. Raises `DestinationRefused`, `NameNotFound`."""
        if self._is_trusted(destination):
            return self.guard.resolve(destination.host, destination.port)
        return self.guard.addresses(destination)

    def is_hub(self, destination: Destination) -> bool:
        """Whether the token may go there."""
        own = parse_destination(self.endpoint)
        return (own.tls, own.host, own.port) == (destination.tls, destination.host, destination.port)

    def _is_trusted(self, destination: Destination) -> bool:
        if self.is_hub(destination):
            return self.endpoint != HUB_ENDPOINT
        spelled = (destination.authority, destination.host)
        return any(host in spelled for host in self.hosts if "*" not in host)


def place_of(settings: Settings) -> HubPlace:
    """The hub of the settings. Raises Unprocessable `hub-offline` where the environment forbids it."""
    if settings.hub_offline:
        raise Unprocessable(
            "hub-offline",
            "The hub must be reachable by leave of the environment. Got HF_HUB_OFFLINE or "
            "TRANSFORMERS_OFFLINE. Unset them where Bitplan starts, or send the files.",
            pointer="/hub",
        )
    return HubPlace(settings.hub_endpoint, settings.hub_hosts, settings.hub_token)


def require_offered(settings: Settings) -> None:
    """Raise Unprocessable `hub-not-offered` unless the operator has opened the hub."""
    if not settings.hub:
        raise Unprocessable(
            "hub-not-offered",
            "Models of a hub must be allowed by BITPLAN_HUB=true. Got no leave. Upload the model instead, or "
            "ask the operator.",
            pointer="/hub",
        )
    place_of(settings)
