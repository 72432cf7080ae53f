from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import Unprocessable
from service.hub.place import HubPlace, place_of, require_offered
from service.settings import Settings
from service.webhooks.guard import DestinationRefused


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("https://huggingface.co/a/b", True),
        ("https://cdn-lfs-us-1.hf.co/repos/x?Signature=" + "a" * 3000, True),
        ("https://cas-bridge.xethub.hf.co/x", True),
        ("https://hf.co.evil.example/x", False),
        ("https://evilhf.co/x", False),
        ("http://cdn.hf.co/x", False),
        ("https://cdn.hf.co:8000/x", False),
        ("http://huggingface.co/a/b", False),
        ("https://huggingface.co:444/a/b", False),
        ("https://169.254.169.254/x", False),
    ],
)
def test_the_well_known_hub_and_its_hosts(url: str, fine: bool) -> None:
    place = HubPlace("https://huggingface.co", ("*.hf.co", "*.huggingface.co"))
    if fine:
        assert place.destination(url).tls
    else:
        with pytest.raises(DestinationRefused):
            place.destination(url)


def test_the_token_is_for_the_endpoint_alone() -> None:
    place = HubPlace("https://huggingface.co", ("*.hf.co",), "hf_x")
    assert place.is_hub(place.destination("https://huggingface.co/a"))
    assert not place.is_hub(place.destination("https://cdn.hf.co/a"))


def test_hosts_that_the_operator_spells_out_may_be_anywhere() -> None:
    place = HubPlace("http://mirror.internal:8080", ("files.internal:9000", "plain.internal"))
    for url in ("http://mirror.internal:8080/a", "http://files.internal:9000/a", "https://plain.internal/a"):
        assert place.destination(url)
    with pytest.raises(DestinationRefused):
        place.destination("http://files.internal:9001/a")


def test_settings_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    secret = tmp_path / "token"
    secret.write_text("hf_of_a_file\n")
    monkeypatch.setenv("BITPLAN_HUB_TOKEN_FILE", str(secret))
    monkeypatch.setenv("BITPLAN_HUB_HOSTS", "*.hf.co, files.internal:9000")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    settings = Settings()
    place = place_of(settings)
    assert (place.endpoint, place.token) == ("https://mirror.example", "hf_of_a_file")
    assert place.hosts == ("*.hf.co", "files.internal:9000")
    with pytest.raises(Unprocessable, match="BITPLAN_HUB=true"):
        require_offered(settings)
    require_offered(Settings(hub=True))


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_offline_variables_are_respected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    with pytest.raises(Unprocessable, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"):
        place_of(Settings(hub=True))
    monkeypatch.setenv(name, "0")
    place_of(Settings(hub=True))


@pytest.mark.parametrize("endpoint", ["file:///etc", "huggingface.co", "https://user:pw@hub.example", ""])
def test_an_endpoint_is_a_plain_address(endpoint: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Settings(hub_endpoint=endpoint)


def test_the_token_is_not_shown_and_reaches_our_own_processes() -> None:
    settings = Settings(hub_token="hf_secret")
    assert "hf_secret" not in repr(settings)
    assert settings.as_environment()["BITPLAN_HUB_TOKEN"] == "hf_secret"


def test_a_link_that_is_too_long_is_told_its_limit() -> None:
    with pytest.raises(DestinationRefused, match="A URL must be .* at most 8000 characters"):
        HubPlace("https://huggingface.co").destination("https://huggingface.co/" + "a" * 8000)


def test_hosts_are_the_same_in_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_HUB_HOSTS", "*.HF.co, Mirror.Example:8000")
    place = place_of(Settings(data_dir=tmp_path, hub_offline=False))
    assert place.destination("https://CDN.hf.co/x").host == "cdn.hf.co"
    assert place.destination("http://mirror.example:8000/x").port == 8000
