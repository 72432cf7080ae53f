import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service import failpoints
from service.failpoints import FAILPOINTS, FailpointError, FailpointReached, failpoint, parse_failpoints

ROOT = Path(__file__).parents[2]
NAME = "runner.after_store"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_passes", failpoints.Counter())
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    monkeypatch.delenv(failpoints.ONCE_VARIABLE, raising=False)


def test_nothing_happens_unless_asked() -> None:
    failpoint(NAME)


def test_the_nth_pass_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"worker.before_unit=kill, {NAME}:3=raise")
    failpoint(NAME)
    failpoint(NAME)
    with pytest.raises(FailpointReached, match=NAME):
        failpoint(NAME)
    failpoint(NAME)


def test_once_over_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"{NAME}=raise")
    monkeypatch.setenv(failpoints.ONCE_VARIABLE, str(tmp_path))
    with pytest.raises(FailpointReached):
        failpoint(NAME)
    monkeypatch.setattr(failpoints, "_passes", failpoints.Counter())
    failpoint(NAME)


@pytest.mark.parametrize(
    "text", ["x", NAME, f"{NAME}=explode", f"{NAME}:0=kill", f"{NAME}=sleep", "nowhere=kill"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(FailpointError, match="A failpoint must be"):
        parse_failpoints(text)


def test_code_may_name_only_what_the_catalog_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"{NAME}=raise")
    with pytest.raises(FailpointError, match="Got 'nowhere'"):
        failpoint("nowhere")


@pytest.mark.parametrize(("verb", "status"), [("kill", -signal.SIGKILL), ("exit", failpoints.EXIT_STATUS)])
def test_processes_end_as_asked(verb: str, status: int) -> None:
    code = f"from service.failpoints import failpoint; failpoint({NAME!r}); print('survived')"
    variables = {failpoints.VARIABLE: f"{NAME}={verb}", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (status, b"")


def test_every_place_of_the_catalog_stands_in_the_code() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    named = set(re.findall(r'failpoint\("([a-z_.]+)"\)', source))
    built = {"runner.scoring", "runner.choosing", "runner.reporting"}
    assert named | built == set(FAILPOINTS)


def test_a_stopped_process_goes_on_when_it_is_told_to() -> None:
    code = f"from service.failpoints import failpoint; failpoint({NAME!r}); print('went on')"
    variables = {failpoints.VARIABLE: f"{NAME}=stop", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == b"went on\n"
    assert process.returncode == 0
