"""What a job's measurements are planned by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sensitivity import session as session_module
from sensitivity.scorers.hessian_trace import HessianTrace, micro_batches, turn_size
from sensitivity.session import Session
from sensitivity.units import Arrays, InspectUnit
from service.runner.lab import block_plan

LAYER = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
LOGITS = 5


def traced(session: Session, asked: int) -> tuple[float, dict[str, Arrays]]:
    """The score of one layer, with every block that the plan asks for measured by the session."""
    facts = session.run(InspectUnit()).facts
    plan = block_plan({LAYER: ("w3",)}, 6, replace(session.spec, batch_size=asked), facts)
    assert micro_batches(plan) == session.batch_sizes("scoring")
    done: dict[str, Arrays] = {}
    while units := HessianTrace().blocks(plan, done):
        done |= {unit.key: dict(session.run(unit).arrays) for unit in units}
    (row,) = HessianTrace().combine(plan, done)
    return row.value, done


def test_blocks_are_planned_by_the_micro_batches_that_workers_make(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large outputs cut four samples at a time to one: the trace is that of a session asked for one."""
    spec = tiny("resnet").spec(max_probes=80, relative_error=1e-9)
    expected, blocks = traced(Session(replace(spec, batch_size=1)), 1)
    monkeypatch.setattr(session_module, "MICRO_BATCH_BYTES", LOGITS * 4)
    found, cut = traced(Session(spec), spec.batch_size)
    assert found == expected
    assert set(cut) == set(blocks)
    assert turn_size(spec, 2) != turn_size(spec, 6)
    for key, arrays in blocks.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(cut[key][name], values)


def test_the_batch_size_is_the_same_in_any_precision(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MICRO_BATCH_BYTES", 2 * LOGITS * 4)
    session = Session(tiny("resnet").spec())
    assert session.batch_sizes("scoring") == [2, 2, 2]
    session.model.to(torch.bfloat16)
    assert session._samples_at_a_time() == 2
