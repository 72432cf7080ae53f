"""Every metric on a bf16 model: finite, and the score that the same weights have in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.catalog import SCORERS, TASKS
from sensitivity.scorers import gram_fisher
from sensitivity.session import Session
from sensitivity.units import BlockPlan, ScoreRow, ScoreUnit

LAYERS = 3
SCHEMES = ("w2", "w4")
"""Finer schemes change a bf16 model's outputs by less than its own rounding: docs/metrics.md."""
OFFERED = tuple(
    name
    for name, metric in SCORERS.items()
    if metric.unit in ("choice", "block") and metric.needs <= TASKS["causal_lm"].offers
)
"""A metric of roles is made of these; the model has no experts."""
AGAINST_THE_TRUTH = {"loss_delta", "metric_delta"}
"""Differences of losses that nearly cancel: only their size is compared."""

STOPS_WHERE_IT_STANDS = {"hessian_top_eigenvalue"}
"""Power iteration may rest at a smaller eigenvalue in one precision and pass it in the other."""


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_fisher, "MOST_DRAWS", 2 * gram_fisher.DRAWS)
        yield


@pytest.fixture(scope="module")
def session(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Session]:
    """The same weights, which bf16 holds exactly, stored and computed in either type."""
    import torch
    from transformers import LlamaForCausalLM

    source, made = tiny("llama"), {}
    for name in ("bfloat16", "float32"):
        folder = tmp_path_factory.mktemp(name)
        model = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16)
        model.to(getattr(torch, name)).save_pretrained(folder)
        for file in source.folder.glob("tok*"):
            shutil.copy(file, folder / Path(file).name)
        made[name] = Session(replace(source, location=str(folder)).spec(max_probes=16))
    return made.__getitem__


def rows_of(session: Session, metric: str) -> list[ScoreRow]:
    entry = SCORERS[metric]
    layers = tuple(layer.name for layer in session.inventory.layers[:LAYERS])
    if entry.unit == "choice":
        units = [ScoreUnit(layer, scheme, (metric,)) for layer in layers for scheme in SCHEMES]
        return [row for unit in units for row in session.run(unit).scores]
    scorer, done = entry.load(), {}
    plan = BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    return list(scorer.combine(plan, done))


@pytest.mark.parametrize("metric", OFFERED)
def test_a_bf16_model_has_the_scores_of_its_weights_in_float32(metric: str, session: Any) -> None:
    half, full = (rows_of(session(name), metric) for name in ("bfloat16", "float32"))
    assert [(row.layer, row.scheme) for row in half] == [(row.layer, row.scheme) for row in full]
    values, truth = (np.array([row.value for row in rows]) for rows in (half, full))
    assert np.isfinite(values).all()
    if metric in AGAINST_THE_TRUTH:
        assert values.max() <= 2 * truth.max() + 0.05
        return
    assert np.median(np.abs(values / truth - 1)) < 0.15
    assert np.abs(values / truth - 1).max() < 0.6 or metric in STOPS_WHERE_IT_STANDS
