"""Where webhooks must not go."""

from __future__ import annotations

import ipaddress
import re

import pytest

from service.webhooks.guard import (
    DestinationRefused,
    Guard,
    NameNotFound,
    is_public,
    parse_destination,
    resolved,
)

PUBLIC = ("93.184.216.34", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101")
REFUSED = (
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
)


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))
    assert Guard(resolve=lambda host, port: [text]).addresses(parse_destination("https://a.example/")) == [
        text
    ]


@pytest.mark.parametrize("text", REFUSED)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))
    guard = Guard(resolve=lambda host, port: ["93.184.216.34", text])
    with pytest.raises(DestinationRefused, match="must have public addresses only") as caught:
        guard.addresses(parse_destination("https://a.example/"))
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]:8443/",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://a.localhost/",
    ],
)
def test_literal_and_local_hosts_are_refused_at_once(url: str) -> None:
    with pytest.raises(DestinationRefused, match="BITPLAN_WEBHOOK_NETWORKS"):
        Guard().check(parse_destination(url))


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_other_spellings_of_an_address_are_checked_when_they_are_resolved(host: str) -> None:
    with pytest.raises((DestinationRefused, NameNotFound)):
        Guard().addresses(parse_destination(f"https://{host}/"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a.example/", "must begin with https://. Got http://"),
        ("http://93.184.216.34/", "must begin with https://. Got http://"),
        ("https://a.example:22/", "must be 443 or 8443. Got 22"),
        ("https://93.184.216.34:6379/", "must be 443 or 8443. Got 6379"),
    ],
)
def test_tls_and_its_ports_are_required(url: str, words: str) -> None:
    with pytest.raises(DestinationRefused, match=re.escape(words)):
        Guard().check(parse_destination(url))
    with pytest.raises(DestinationRefused, match=re.escape(words)):
        Guard(resolve=lambda host, port: ["93.184.216.34"]).addresses(parse_destination(url))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hooks",
        "ftp://a.example/",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@a.example/",
        "https://a.example\\@127.0.0.1/",
        "https://a.example/#part",
        "https://exa mple.com/",
        "https://%31%32%37.0.0.1/",
        "https://a\n.example/",
        "https://a.example:99999/",
        "https://a.example:0/",
        "https://[::1/",
        "https://a.example/" + "x" * 2000,
        "https://" + "a" * 300 + "/",
    ],
)
def test_what_is_no_url_of_a_receiver(url: str) -> None:
    with pytest.raises(DestinationRefused, match="must be https://host/path") as caught:
        parse_destination(url)
    assert "secret" not in str(caught.value)


def test_a_url_is_taken_apart_once() -> None:
    found = parse_destination("https://münchen.example/ä?b=c d")
    assert (found.tls, found.host, found.port) == (True, "xn--mnchen-3ya.example", 443)
    assert found.target == "/%C3%A4?b=c%20d"
    assert parse_destination("http://[::1]:8080/").authority == "[::1]:8080"


def test_allowed_networks_take_any_port_without_tls() -> None:
    guard = Guard.of(["127.0.0.0/8", "fd00::/8"])
    for url in (
        "http://127.0.0.1:8080/",
        "https://127.0.0.1:22/",
        "http://[fd00::1]/",
        "http://name.internal/",
    ):
        guard.check(parse_destination(url))
    with pytest.raises(DestinationRefused, match="public addresses only"):
        guard.check(parse_destination("http://10.0.0.1/"))
    mixed = Guard.of(["127.0.0.0/8"])
    assert resolved("127.0.0.1", 80) == ["127.0.0.1"]
    assert mixed.addresses(parse_destination("http://127.0.0.1:8080/")) == ["127.0.0.1"]
    plain = Guard(mixed.networks, lambda host, port: ["93.184.216.34"])
    with pytest.raises(DestinationRefused, match="must begin with https://"):
        plain.addresses(parse_destination("http://a.example/"))


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(NameNotFound, match="no address for 'nobody.invalid'"):
        Guard().addresses(parse_destination("https://nobody.invalid/"))
