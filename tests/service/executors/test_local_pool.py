"""What only the pool of local processes must do: its workers never outlive the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.executors.worker_process import environment

FAKES = Path(__file__).parent
ROOT = FAKES.parents[2]
PARENT = """
import sys, time
from pathlib import Path
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.executors.local_pool import LocalPool
from service.executors.protocol import ExecutorSettings

pool = LocalPool(ExecutorSettings(2, Path(sys.argv[1]), "fake_session:FakeSession"))
pool.start(SessionSpec(ModelSource("folder", "fine", "aa"), DataSource("none", "text", "bb")))
for index in range(2):
    pool.submit(str(index), ScoreUnit("warm", f"w{index + 2}", ("output_kl",)))
outcomes = []
deadline = time.monotonic() + 20
while time.monotonic() < deadline and (len(outcomes) < 2 or len(pool.worker_pids) < 2):
    outcomes += pool.wait(0.1)
pool.submit("busy", ScoreUnit("sleep:600", "w4", ("output_kl",)))
time.sleep(0.3)
print(*pool.worker_pids, flush=True)
print(outcomes, pool.worker_pids, file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_orphans_leave_by_themselves_busy_or_not(tmp_path: Path, number: signal.Signals) -> None:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(FAKES)])}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(number)
        parent.wait(10)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_environment_is_an_allow_list() -> None:
    given = {"PATH": "/bin", "BITPLAN_DATABASE_URL": "x", "HF_TOKEN": "y", "BITPLAN_FAILPOINTS": "z"}
    made = environment(3, given)
    assert made["PATH"] == "/bin"
    assert made["BITPLAN_FAILPOINTS"] == "z"
    assert {made[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert {made[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} == {"1"}
    assert not {"x", "y"} & set(made.values())
    assert str(ROOT) in made["PYTHONPATH"].split(os.pathsep)
