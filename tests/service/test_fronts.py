"""The API process and the runner process start without torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")
MODULES = (
    "service.app",
    "service.cli.main",
    "service.client",
    "service.estimate",
    "service.local",
    "service.serve",
    "service.db.migrate",
    "service.store.blobs",
    "service.executors.protocol",
    "service.executors.local_pool",
    "service.executors.worker",
    "service.runner.loop",
    "service.runner.checkpoint_job",
    "service.runner.dispatch",
    "service.runner.process",
)


def loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    return set(done.stdout.decode().split())


def test_the_fronts_load_nothing_heavy() -> None:
    """All in one interpreter; each in its own only to name the culprit."""
    together = loaded(f"import {', '.join(MODULES)}")
    assert not together, {module: loaded(f"import {module}") for module in MODULES}


def test_the_handlers_load_nothing_heavy() -> None:
    assert loaded("from service.runner.catalog import load_handlers; load_handlers()") == set()


def test_the_check_can_see_torch() -> None:
    assert "torch" in loaded("import torch")
