"""The command as a whole: help, version, start-up, and what it says of a command line it cannot read."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import Result

from service.cli.main import PANELS, main

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "sqlalchemy", "alembic", "scipy", "fastapi")
COMMANDS = [command.__name__ for panel in PANELS.values() for command in panel]


def test_every_command_of_the_manual_exists(bitplan: Callable[..., Result]) -> None:
    page = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    shown = bitplan("--help").stdout
    for name in COMMANDS:
        assert f"\n│ {name} " in shown
        assert f"`bitplan {name}" in page
    assert "\n│ keys " in shown
    for name in ("create", "list", "revoke"):
        assert f"\n│ {name} " in bitplan("keys", "--help").stdout
        assert f"`bitplan keys {name}" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(bitplan: Callable[..., Result], name: str) -> None:
    result = bitplan(name, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_run_and_submit_share_the_options_of_a_search(bitplan: Callable[..., Result]) -> None:
    wanted = (
        "--budget --schemes --limit --metric --task --samples --sequence-length --seed --device --pin --tie --forbid "
        "--exclude --include --latency-table --time-limit --gap --evaluations --chooser --objective --relative-error --max-probes "
        "--batch-size --no-interactions --output --json --dry-run"
    )
    for name in ("run", "submit"):
        shown = bitplan(name, "--help").stdout
        assert [option for option in wanted.split() if option not in shown] == []
    assert "--factory" not in bitplan("submit", "--help").stdout


def test_version(bitplan: Callable[..., Result]) -> None:
    assert bitplan("--version").stdout == f"bitplan {version('bitplan')}\n"


def test_no_command_at_all_shows_the_help(bitplan: Callable[..., Result]) -> None:
    result = bitplan()
    assert result.exit_code == 2
    assert "allocate" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["allocate", "table.json", "--json"]])
def test_it_starts_without_the_heavy_libraries(arguments: list[str], tmp_path: Path) -> None:
    table = {
        "schema": "bitplan.table/1",
        "layers": [{"name": "a", "parameters": 1}],
        "schemes": ["w2"],
        "metrics": {"loss": {"direction": "min", "values": [[1]]}},
        "resources": {"bytes": [[1]]},
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    code = (
        "import atexit, sys; from service.cli.main import main; sys.argv[1:] = sys.argv[1:]\n"
        f"atexit.register(lambda: print(*[n for n in {HEAVY} if n in sys.modules], file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitplan", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_command_line_that_cannot_be_read_is_told_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "run", "--samples", "few", "--json") == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["exit"] == 2
    assert "--samples" in json.loads(told.out)["error"]
    assert "Traceback" not in told.err
    assert run_main(monkeypatch, "run", "--samples", "few") == 2
    assert capsys.readouterr().out == ""


def test_statuses_leave_through_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "allocate", str(tmp_path / "none.json"), "--json") == 2
    assert "none.json" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "service" / "cli").glob("[a-z]*.py"))])
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(import_module(f"service.cli.{name}")).failed == 0
