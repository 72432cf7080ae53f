"""Commands that take secrets from files, and say what is wrong with these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


def test_commands_say_what_is_wrong_with_a_file(
    bitplan: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_PASSWORD_FILE", "/nowhere/password")
    for command in (("migrate", "--json"), ("runner",), ("doctor",), ("keys", "list")):
        result = bitplan(*command)
        assert result.exit_code == 2
        assert "BITPLAN_DATABASE_PASSWORD_FILE must name a file that this user can read." in result.stderr
        assert "Traceback" not in result.stderr


def test_the_secret_of_webhooks_may_stand_in_a_file(
    bitplan: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BITPLAN_WEBHOOK_SECRET", raising=False)
    monkeypatch.setenv("BITPLAN_WEBHOOK_SECRET_FILE", str(tmp_path / "none"))
    common = ("submit", "model_x", "-c", "cal_x", "-b", "3 bpw", "--webhook", "https://hooks.example.com/")
    refused = bitplan(*common)
    assert refused.exit_code == 2
    assert "BITPLAN_WEBHOOK_SECRET_FILE must name a file that this user can read." in refused.stderr
    file = tmp_path / "secret"
    file.write_text("whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\n")
    monkeypatch.setenv("BITPLAN_WEBHOOK_SECRET_FILE", str(file))
    sent = bitplan(*common, "--server", "http://127.0.0.1:1")
    assert sent.exit_code == 1
    assert "whsec_" not in sent.stderr
