"""A function of the user's own as a metric: against its definition, and what is told of a wrong one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensitivity.catalog import USER_METRIC
from sensitivity.errors import BadUserMetric
from sensitivity.session import Session
from sensitivity.spec import SessionSpec
from sensitivity.units import InspectUnit, MeasureUnit, ScoreUnit
from sensitivity.user_code import user_metric

METRICS = """
import torch

def margin(outputs, batch, reference):
    top = outputs.rows.topk(2, dim=-1).values
    return -outputs.means(top[:, 0] - top[:, 1])

def raises(outputs, batch, reference):
    raise KeyError("answers")

def short(outputs, batch, reference):
    return torch.zeros(1)

def odd(outputs, batch, reference):
    return torch.full((batch.size,), float("nan"))
"""


@pytest.fixture
def spec(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SessionSpec]:
    (tmp_path / "own_metrics.py").write_text(METRICS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    return lambda name: replace(tiny("resnet").spec(), user_metric=user_metric(f"own_metrics:{name}"))


def margins(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    ordered = np.sort(rows.double().numpy(), axis=1)
    return ordered[:, -2] - ordered[:, -1]


def test_it_is_the_mean_rise_over_the_scoring_part(spec: Callable[[str], SessionSpec]) -> None:
    session = Session(spec("margin"))
    layer = session.inventory.layers[1].name
    row = session.run(ScoreUnit(layer, "w2", (USER_METRIC,))).scores[0]
    pairs = list(session.forwards.pairs("scoring", ((layer, "w2"),)))
    rises = np.concatenate([margins(pair.outputs.rows) - margins(pair.reference.rows) for pair in pairs])
    assert row.value == pytest.approx(max(rises.mean(), 0.0), rel=1e-5, abs=1e-12)
    assert row.stderr == pytest.approx(rises.std(ddof=1) / len(rises) ** 0.5, rel=1e-5)


def test_plans_are_measured_by_it_too(spec: Callable[[str], SessionSpec]) -> None:
    session = Session(spec("margin"))
    assert USER_METRIC in session.run(InspectUnit()).facts["available_metrics"]
    plan = tuple((layer.name, "w4") for layer in session.inventory.layers)
    found = session.run(MeasureUnit(plan, "reporting")).arrays[USER_METRIC]
    pairs = session.forwards.pairs("reporting", plan)
    np.testing.assert_allclose(
        found, np.concatenate([margins(pair.outputs.rows) for pair in pairs]), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", r"must work as function\(outputs, batch, reference\). Got KeyError: 'answers'"),
        ("short", r"one finite number for each of \d+ samples. Got shape \(1,\)"),
        ("odd", "with NaN or infinity"),
        ("missing", "must hold a function 'missing'. Got none"),
    ],
)
def test_a_wrong_one_is_told(spec: Callable[[str], SessionSpec], name: str, told: str) -> None:
    def measure() -> None:
        session = Session(spec(name))
        session.run(ScoreUnit(session.inventory.layers[0].name, "w2", (USER_METRIC,)))

    with pytest.raises(BadUserMetric, match=told):
        measure()


@pytest.mark.parametrize("location", ["own_metrics", ":margin", "no_such_module:margin", "sys:exit"])
def test_a_name_that_leads_nowhere_is_told(location: str) -> None:
    with pytest.raises(ValueError, match=r"must be .* Got"):
        user_metric(location)


def test_its_source_is_part_of_what_scores_are_kept_under(
    spec: Callable[[str], SessionSpec], tmp_path: Path
) -> None:
    before = spec("margin")
    assert SessionSpec.from_json(before.as_json()) == before
    (tmp_path / "own_metrics.py").write_text(METRICS + "# other\n", encoding="utf-8")
    after = replace(before, user_metric=user_metric("own_metrics:margin"))
    assert after.score_settings() != before.score_settings()
