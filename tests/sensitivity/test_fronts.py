"""The runner and the API plan, combine and check without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sensitivity.catalog import SCORERS, TASKS

FRONTS = (
    "sensitivity.spec",
    "sensitivity.units",
    "sensitivity.catalog",
    "sensitivity.errors",
    "sensitivity.calibration_check",
    "sensitivity.gram",
    "sensitivity.memory",
    "sensitivity.ranks",
    "sensitivity.evidence",
    "sensitivity.estimators",
    "sensitivity.scorers.protocol",
    *(metric.module.split(":")[0] for metric in SCORERS.values()),
)

PLAN_WITHOUT_TORCH = """
import sys, numpy as np
from sensitivity.catalog import SCORERS
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockPlan
spec = SessionSpec(ModelSource("folder", "m", "aa"), DataSource("c", "text", "bb"))
for metric in SCORERS.values():
    scorer = metric.load()
    if metric.unit == "block":
        assert scorer.blocks(BlockPlan(("fc",), ("w4",), 20, spec), {})
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("front", sorted(set(FRONTS)))
def test_a_front_does_not_load_torch(front: str) -> None:
    run_python(f"import sys, {front}; assert 'torch' not in sys.modules")


def test_planning_blocks_does_not_load_torch() -> None:
    run_python(PLAN_WITHOUT_TORCH)


def test_every_catalog_line_loads() -> None:
    for entry in (*SCORERS.values(), *TASKS.values()):
        assert entry.load() is not None
        assert entry.summary.endswith(".")


def test_catalog_keys_are_names() -> None:
    assert all(name == entry.name for name, entry in (*SCORERS.items(), *TASKS.items()))
