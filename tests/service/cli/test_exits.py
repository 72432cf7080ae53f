"""Exit codes: which exception becomes which, and what is printed where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from service.cli.exits import CommandError, Exit, exits, explain, leave_with, option_of, plan_exit
from service.cli.main import app
from service.cli.request import SearchOptions
from service.db.migrate import DatabaseTooNew
from service.errors import InsufficientStorage, Unprocessable
from service.remote.transport import ConnectionFailed, JobFailed, ProblemError
from service.settings import Settings
from service.wire import JobRequest


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CommandError("no", Exit.NO_PLAN_IN_TIME), Exit.NO_PLAN_IN_TIME, "no"),
        (Unprocessable("slug", "X must be."), Exit.BAD_INPUT, "X must be."),
        (InsufficientStorage("disk-full", "full"), Exit.FAILED, "full"),
        (ProblemError(422, {"detail": "d", "pointer": "/budgets"}), Exit.BAD_INPUT, "d (at /budgets)"),
        (ProblemError(500, {"title": "Internal error"}), Exit.FAILED, "Internal error"),
        (JobFailed({"id": "j", "state": "failed", "problem": {"status": 422}}), Exit.BAD_INPUT, "Job j"),
        (JobFailed({"id": "j", "state": "cancelled", "problem": None}), Exit.FAILED, "cancelled"),
        (ConnectionFailed("gone"), Exit.FAILED, "gone"),
        (ValueError("bad"), Exit.BAD_INPUT, "bad"),
        (ValueError(), Exit.BAD_INPUT, "ValueError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"), Exit.BAD_INPUT, "must be UTF-8"),
        (FileNotFoundError(2, "No such file", "a.json"), Exit.BAD_INPUT, "'a.json'"),
        (FileNotFoundError("in words"), Exit.BAD_INPUT, "in words"),
        (OSError(28, "No space left"), Exit.FAILED, "No space left"),
        (DatabaseTooNew("9999", "0001"), Exit.FAILED, "Got 9999"),
    ],
)
def test_each_exception_has_its_status(error: Exception, code: Exit, words: str) -> None:
    told = explain(error)
    assert told is not None
    assert told[1] is code
    assert words in told[0]


def test_what_nobody_expects_stays_an_exception() -> None:
    assert explain(KeyError("x")) is None
    with pytest.raises(KeyError), exits():
        raise KeyError("x")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["optimal", "feasible"], Exit.DONE),
        (["optimal", "unknown"], Exit.NO_PLAN_IN_TIME),
        (["unknown", "infeasible"], Exit.INFEASIBLE),
    ],
)
def test_the_worst_plan_decides(statuses: list[str], code: Exit) -> None:
    assert plan_exit(statuses) is code


def test_done_is_no_exception() -> None:
    leave_with(Exit.DONE)
    with pytest.raises(typer.Exit) as end:
        leave_with(Exit.INFEASIBLE)
    assert end.value.exit_code == 3


def test_an_interruption_says_how_things_stand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, exits(as_json=True, interrupted="nothing was written"):
        raise KeyboardInterrupt
    assert end.value.exit_code == 130
    told = capsys.readouterr()
    assert json.loads(told.out) == {"error": "interrupted: nothing was written", "exit": 130}
    assert told.err == "bitplan: interrupted: nothing was written\n"


def test_every_member_of_a_request_has_an_option_that_exists() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    asked = SearchOptions(
        budgets=["4 bpw"], schemes="w4", ratios=[1.0], context_length=64, context_weights=["a=1"]
    )
    members = asked.parameters()
    places = [(name,) for name in members if name != "contexts"]
    places += [(name, inner) for name in ("deployment", "contexts") for inner in members[name]]
    assert ("deployment", "kv_cache") in places
    assert not {place: option_of(*place) for place in places if option_of(*place) not in known}


def test_faults_of_a_request_name_options() -> None:
    faults = {"budgets": ["many"], "latency_ns": {"a": {"w4": -1}}, "device": "tpu", "pins": {"a": "w99"}}
    with pytest.raises(ValueError, match="validation errors") as caught:
        JobRequest.model_validate({"model": "m", "calibration": "c", **faults})
    told = explain(caught.value)
    assert told is not None
    lines = told[0].splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--budget", "--pin", "--device", "--latency-table"]
    assert lines[2].endswith("Got 'tpu'.")


def test_faults_of_the_environment_name_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPLAN_WORKERS", "0")
    with pytest.raises(ValueError, match="workers") as caught:
        Settings(data_dir=tmp_path)
    told = explain(caught.value)
    assert told is not None
    assert told[0].startswith("BITPLAN_WORKERS: ")
