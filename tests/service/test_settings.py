from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BITPLAN_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def test_defaults_need_nothing(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.data_dir == tmp_path / "bitplan"
    assert settings.database_url == f"sqlite:///{tmp_path}/bitplan/bitplan.db"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert 1 <= settings.workers <= 4
    assert (settings.lease_seconds, settings.heartbeat_seconds) == (60, 15)
    assert settings.model_folders == ()


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPLAN_DATA_DIR", "~/somewhere")
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("BITPLAN_MODEL_FOLDERS", "/a:/b")
    monkeypatch.setenv("BITPLAN_LOG_LEVEL", "DEBUG")
    settings = Settings()
    assert settings.data_dir == Path.home() / "somewhere"
    assert settings.database_url == "postgresql://u@h/d"
    assert settings.model_folders == (Path("/a"), Path("/b"))
    assert settings.log_level == "debug"


def test_a_memory_limit_has_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(memory_limit="2 GiB").as_environment()["BITPLAN_MEMORY_LIMIT"] == "2 GiB"
    monkeypatch.setenv("BITPLAN_MEMORY_LIMIT", "2")
    with pytest.raises(ValidationError, match="must be a number with a unit"):
        Settings()


def test_networks_for_webhooks_are_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_WEBHOOK_NETWORKS", "10.0.0.0/8, fd00::/8,")
    assert Settings().webhook_networks == ("10.0.0.0/8", "fd00::/8")
    monkeypatch.setenv("BITPLAN_WEBHOOK_NETWORKS", "10.0.0.0/8,intranet")
    with pytest.raises(ValidationError, match="'intranet' does not appear to be an IPv4 or IPv6 network"):
        Settings()


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_PORT", "9000")
    assert Settings(port=9001).port == 9001


def test_another_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        port=9001,
        model_folders=(Path("/a"), Path("/b")),
        webhook_networks=("10.0.0.0/8", "::1/128"),
        workers=3,
        hub=True,
        hub_hosts=("*.hf.co", "files.internal:9000"),
        hub_token="hf_secret",
    )
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_a_lease_must_outlive_its_heartbeats() -> None:
    with pytest.raises(ValidationError, match="at most half of lease_seconds"):
        Settings(lease_seconds=10, heartbeat_seconds=6)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"port": 70000}, {"log_level": "loud"}, {"unknown": 1}])
def test_nonsense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**bad)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1
