"""What every line of SCORERS must do, on every task that offers it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.catalog import SCORERS, TASKS, Metric, Workload, offered_metrics
from sensitivity.errors import BadUnit, MetricNotOffered
from sensitivity.scorers import gram_fisher
from sensitivity.session import Session
from sensitivity.units import BlockPlan, BlockUnit, ScoreRow, ScoreUnit, unit_from_json

EXPERTS = "causal_lm of fused experts"
MODELS = {
    "causal_lm": "llama",
    "sequence_embedding": "bert",
    "image_classification": "resnet",
    "generic": "mlp",
    EXPERTS: "mixtral",
}
SCHEMES = ("w2", "w3", "w4", "w6", "w8")
HAS_LABELS = {"image_classification"}
PAIRS = [(metric, task) for metric in SCORERS for task in TASKS]
OFFERED = [(m, t) for m, t in PAIRS if m in offered_metrics(t, has_labels=t in HAS_LABELS)]
AGAINST_THE_TRUTH = {"loss_delta", "metric_delta"}
"""A model with random weights may come closer to the truth by being quantized."""
ADAPTIVE = {"hessian_trace", "gram_fisher", "hessian_top_eigenvalue"}
"""They stop when they know enough."""
WITH_EXPERTS = [*OFFERED, *((m, EXPERTS) for m, t in OFFERED if t == "causal_lm")]
REFUSED = [pair for pair in PAIRS if pair not in OFFERED]


def test_every_task_has_a_model_here() -> None:
    assert set(MODELS) == {*TASKS, EXPERTS}


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    """On six samples the ranking of plans never settles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_fisher, "MOST_DRAWS", 2 * gram_fisher.DRAWS)
        yield


@pytest.fixture(scope="module")
def scores(tiny: Any) -> Callable[..., tuple[ScoreRow, ...]]:
    """All rows of a metric on a task, measured in a session of its own; the first run is kept."""
    kept: dict[tuple[str, str], tuple[ScoreRow, ...]] = {}

    def measure(metric: str, task: str, *, again: bool = False) -> tuple[ScoreRow, ...]:
        if again or (metric, task) not in kept:
            rows = rows_of(Session(tiny(MODELS[task]).spec()), SCORERS[metric], reverse=again)
            if again:
                return rows
            kept[metric, task] = rows
        return kept[metric, task]

    return measure


def plan_of(session: Session) -> BlockPlan:
    layers = tuple(layer.name for layer in session.inventory.layers)
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


def rows_of(session: Session, metric: Metric, *, reverse: bool) -> tuple[ScoreRow, ...]:
    """Every (layer, scheme), through units that went through JSON, in one order or the other."""
    plan = plan_of(session)
    if metric.unit == "block":
        return block_rows(session, metric, plan, reverse=reverse)
    units = [ScoreUnit(layer, scheme, (metric.name,)) for layer in plan.layers for scheme in SCHEMES]
    results = {unit.key: session.run(unit) for unit in (reversed(units) if reverse else units)}
    return tuple(row for unit in units for row in results[unit.key].scores)


def block_rows(session: Session, metric: Metric, plan: BlockPlan, *, reverse: bool) -> tuple[ScoreRow, ...]:
    scorer, done = metric.load(), {}
    while units := scorer.blocks(plan, done):
        assert len({unit.key for unit in units}) == len(units)
        for unit in units[::-1] if reverse else units:
            assert unit.key not in done
            result = session.run(unit_from_json(json.loads(json.dumps(unit.as_json()))))
            assert result.arrays
            assert all(np.isfinite(array).all() for array in result.arrays.values())
            done[unit.key] = result.arrays
    return scorer.combine(plan, done)


@pytest.mark.parametrize(("metric", "task"), WITH_EXPERTS)
def test_every_choice_gets_one_finite_row(metric: str, task: str, tiny: Any, scores: Any) -> None:
    rows = scores(metric, task)
    layers = [layer.name for layer in Session(tiny(MODELS[task]).spec()).inventory.layers]
    assert sorted((row.layer, row.scheme) for row in rows) == sorted((x, s) for x in layers for s in SCHEMES)
    for row in rows:
        assert row.metric == metric
        assert math.isfinite(row.value)
        assert row.stderr is None or (math.isfinite(row.stderr) and row.stderr >= 0)
        assert (row.stderr is None) == (row.samples == 0)


@pytest.mark.parametrize(("metric", "task"), OFFERED)
def test_another_session_in_another_order_gives_the_same_rows(metric: str, task: str, scores: Any) -> None:
    assert scores(metric, task, again=True) == scores(metric, task)


@pytest.mark.parametrize(("metric", "task"), WITH_EXPERTS)
def test_more_bits_are_better_on_average(metric: str, task: str, scores: Any) -> None:
    """Single layers may be out of order; the mean over layers that matter is not. A token that is routed to
    another expert changes the outputs however little the weights changed, so fine schemes may tie there.
    """
    schemes = SCHEMES[:3] if task == EXPERTS else SCHEMES
    by_scheme = {
        scheme: [abs(r.value) for r in scores(metric, task) if r.scheme == scheme] for scheme in schemes
    }
    means = [float(np.mean(by_scheme[scheme])) for scheme in schemes]
    if metric in AGAINST_THE_TRUTH:
        assert all(mean >= 0 for mean in means)
        return
    expected = sorted(means, reverse=SCORERS[metric].direction == "min")
    assert means == expected
    assert len(set(means)) == len(schemes)


@pytest.mark.parametrize(("metric", "task"), REFUSED)
def test_a_metric_is_refused_where_it_cannot_be_measured(metric: str, task: str, tiny: Any) -> None:
    session = Session(tiny(MODELS[task]).spec())
    layer = session.inventory.layers[0].name
    if SCORERS[metric].unit == "choice":
        unit: Any = ScoreUnit(layer, "w4", (metric,))
    else:
        unit = SCORERS[metric].load().blocks(plan_of(session), {})[0]
    with pytest.raises(MetricNotOffered, match=f"{metric} needs .* Offered are output_kl"):
        session.run(unit)


@pytest.mark.parametrize("entry", [*SCORERS, *TASKS])
def test_the_documentation_has_a_row_for_it(entry: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert f"\n| `{entry}`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("metric", SCORERS)
def test_a_metric_is_refused_in_the_wrong_kind_of_unit(metric: str, tiny: Any) -> None:
    session = Session(tiny("mlp").spec())
    wrong: Any = ScoreUnit("0", "w4", (metric,))
    if SCORERS[metric].unit == "choice":
        wrong = BlockUnit(metric, "samples:0:2", ("w4",), ("0",))
    with pytest.raises(BadUnit, match=f"Got '{metric}'"):
        session.run(wrong)


@pytest.mark.parametrize(("metric", "task"), OFFERED)
def test_the_catalog_says_what_a_metric_costs(metric: str, task: str, tiny: Any) -> None:
    session, entry = Session(tiny(MODELS[task]).spec()), SCORERS[metric]
    plan = plan_of(session)
    if entry.unit == "choice":
        units: list[Any] = [
            ScoreUnit(layer, scheme, (metric,)) for layer in plan.layers for scheme in SCHEMES
        ]
        done = {unit.key: session.run(unit) for unit in units}
    else:
        scorer, done = entry.load(), {}
        while missing := scorer.blocks(plan, {key: result.arrays for key, result in done.items()}):
            done |= {unit.key: session.run(unit) for unit in missing}
    spent = sum(result.facts["forwards"] for result in done.values())
    settings = plan.settings
    work = Workload(
        len(plan.layers),
        len(plan.layers) * len(SCHEMES),
        plan.samples,
        settings.max_probes,
        settings.batch_size,
    )
    assert 0 <= spent <= entry.forwards(work)
    assert spent == entry.forwards(work) or metric in ADAPTIVE


@pytest.mark.parametrize("metric", SCORERS.values(), ids=SCORERS)
def test_a_scorer_has_the_parts_of_its_kind(metric: Metric) -> None:
    wanted = {"choice": ("score",), "block": ("blocks", "measure", "combine")}[metric.unit]
    scorer = metric.load()
    for name in wanted:
        assert inspect.getdoc(getattr(scorer, name)), name
    for text in (metric.summary, metric.source, metric.cost, inspect.getdoc(scorer)):
        assert text
    assert metric.version >= 1
