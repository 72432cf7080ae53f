"""Settings that stand in files: `BITPLAN_X_FILE`. A value is never shown, whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from service.db.engine import DatabaseUrlError, parse_url
from service.doctor import examine
from service.executors.isolation import isolation_of
from service.secret_files import MOST_BYTES, SecretFileError
from service.settings import Settings

ROOT = Path(__file__).parents[2]
PASSWORD = "p@ss/w:rd%20"
URL = "postgresql+psycopg://bitplan@postgres:5432/bitplan"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BITPLAN_{name.upper()}", raising=False)
        monkeypatch.delenv(f"BITPLAN_{name.upper()}_FILE", raising=False)
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """secret(setting, content): the file of a setting, named in the environment."""

    def write(setting: str, content: str | bytes) -> Path:
        file = tmp_path / f"{setting}.secret"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        monkeypatch.setenv(f"BITPLAN_{setting.upper()}_FILE", str(file))
        return file

    return write


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_password_from_a_file_becomes_part_of_the_url(secret, monkeypatch, end: str) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", URL)
    secret("database_password", PASSWORD + end)
    settings = Settings()
    url = make_url(settings.database_url)
    assert (url.password, url.host, url.username) == (PASSWORD, "postgres", "bitplan")
    assert settings.database_password == ""
    assert PASSWORD not in repr(settings)
    assert settings.database_url not in repr(settings)


def test_any_setting_may_stand_in_a_file(secret) -> None:
    secret("database_url", "postgresql://u:secret@h/d\n")
    secret("webhook_networks", "10.0.0.0/8,127.0.0.1/32")
    secret("port", "9000")
    settings = Settings()
    assert settings.database_url == "postgresql://u:secret@h/d"
    assert settings.webhook_networks == ("10.0.0.0/8", "127.0.0.1/32")
    assert settings.port == 9000
    assert Settings(port=9001).port == 9001


def test_no_setting_has_the_name_of_the_file_of_another() -> None:
    names = set(Settings.model_fields)
    assert not {name for name in names if f"{name}_file" in names}


def test_another_process_gets_what_was_in_the_files(secret, monkeypatch) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", URL)
    monkeypatch.setenv("BITPLAN_WORKER_CLOSED", "/srv/keys")
    secret("database_password", PASSWORD)
    secret("log_level", "debug")
    settings = Settings()
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_workers_cannot_open_the_files(secret, tmp_path: Path) -> None:
    file = secret("log_level", "debug")
    link = tmp_path / "link"
    link.symlink_to("/etc/hostname")
    settings = Settings(worker_closed=(link,))
    assert settings.worker_closed == (link, file)
    assert {str(file), "/etc/hostname"} <= set(isolation_of(settings).closed)


BAD = {
    "empty": (b"", "which is empty"),
    "blank": (b" \n", "which is empty"),
    "lines": (b"secret\nsecond\n", "which has several lines"),
    "nul": (b"sec\x00ret", "which has several lines or control characters"),
    "latin": ("sécret".encode("latin-1"), "which is not UTF-8"),
    "long": (b"s" * (MOST_BYTES + 1), f"which has more than {MOST_BYTES} bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_holds_one_line(secret, case: str) -> None:
    content, words = BAD[case]
    file = secret("database_password", content)
    with pytest.raises(SecretFileError, match="must name a file with one line of UTF-8 text") as caught:
        Settings()
    said = str(caught.value)
    assert words in said
    assert str(file) in said
    assert "Write the value alone into it." in said
    assert "sec" not in said.replace(str(file), "")


def test_a_missing_file_and_a_folder_are_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_PASSWORD_FILE", str(tmp_path / "none"))
    with pytest.raises(SecretFileError, match=r"that this user can read\. Got '.*none': No such file"):
        Settings()
    monkeypatch.setenv("BITPLAN_DATABASE_PASSWORD_FILE", str(tmp_path))
    with pytest.raises(SecretFileError, match=r"Is a directory\. Correct the path or the file's mode"):
        Settings()


def test_a_file_of_another_user_is_told(tmp_path: Path) -> None:
    """As a user who is not root: modes do not hold for root."""
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    file.chmod(0)
    code = (
        "import os\n"
        "from service.settings import Settings\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: Settings()\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BITPLAN_DATABASE_PASSWORD_FILE": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert f"Got {str(file)!r}: Permission denied." in done.stdout
    assert PASSWORD not in done.stdout


def test_a_value_and_a_file_are_one_too_many(secret, monkeypatch) -> None:
    secret("database_url", "postgresql://u:secret@h/d")
    monkeypatch.setenv("BITPLAN_DATABASE_URL", URL)
    with pytest.raises(SecretFileError, match="must be given once. Got BITPLAN_DATABASE_URL_FILE too"):
        Settings()
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "")
    assert Settings().database_url == "postgresql://u:secret@h/d"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "must be that of a PostgreSQL database where database_password is given. Got sqlite."),
        ("sqlite:////tmp/x.db", "Got sqlite. Set BITPLAN_DATABASE_URL"),
        ("postgres//u:hidden@h", "Got no URL."),
        ("postgresql://u:hidden@h/d", "must have no password where database_password is given."),
    ],
)
def test_a_password_is_for_a_postgresql_url_without_one(secret, monkeypatch, url: str, words: str) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", url)
    secret("database_password", PASSWORD)
    with pytest.raises(ValidationError) as caught:
        Settings()
    said = str(caught.value)
    assert words in said
    assert PASSWORD not in said
    assert "hidden" not in said


def test_no_fault_elsewhere_shows_the_url(monkeypatch) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "postgresql://u:hidden@h/d")
    monkeypatch.setenv("BITPLAN_LEASE_SECONDS", "1")
    with pytest.raises(ValidationError, match="at most half of lease_seconds") as caught:
        Settings()
    assert "hidden" not in str(caught.value)
    with pytest.raises(DatabaseUrlError) as refused:
        parse_url("postgres//u:hidden@h/d")
    assert "hidden" not in str(refused.value)


def test_what_doctor_finds_names_no_password(secret, monkeypatch) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "postgresql://u@127.0.0.1:1/d")
    secret("database_password", PASSWORD)
    found = examine(Settings(data_dir=ROOT))
    assert next(check for check in found if check.name == "database").state == "failed"
    assert PASSWORD not in json.dumps([vars(check) for check in found])
