"""What every line of SCORERS must do, on every task that offers it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.catalog import DECOUPLED, SCORERS, TASKS, Metric, Workload, offered_metrics
from sensitivity.errors import BadUnit, MetricNotOffered
from sensitivity.forwards import Forwards
from sensitivity.scorers import gram_fisher
from sensitivity.session import Session
from sensitivity.units import (
    BlockPlan,
    BlockUnit,
    ScoreRow,
    ScoreUnit,
    UnitResult,
    draws_name,
    unit_from_json,
)

EXPERTS = "causal_lm of fused experts"
MODELS = {
    "causal_lm": "llama",
    "sequence_embedding": "bert",
    "image_classification": "resnet",
    "diffusion": "denoiser",
    "generic": "mlp",
    EXPERTS: "mixtral",
}
SCHEMES = ("w2", "w3", "w4", "w6", "w8")
HAS_LABELS = {"image_classification"}
PAIRS = [(metric, task) for metric in SCORERS for task in TASKS]
OFFERED = [(m, t) for m, t in PAIRS if m in offered_metrics(t, has_labels=t in HAS_LABELS, has_experts=False)]
AGAINST_THE_TRUTH = {"loss_delta", "metric_delta"}
"""A model with random weights may come closer to the truth by being quantized."""
CHOSEN = [pair for pair in OFFERED if SCORERS[pair[0]].unit == "choice"]
ADAPTIVE = {"hessian_trace", "gram_fisher", "hessian_top_eigenvalue", "linearity"}
"""They stop when they know enough, or begin at the block that changes."""
PAIRS_OF_CHOICES = {"pairwise"}
"""Two layers have 25 of them, ten have 1,125."""
UNEVEN = {"hessian_top_eigenvalue"}
"""Its draws are micro-batches, of which the last is smaller and counts for less."""
WITH_EXPERTS = [*OFFERED, *((m, EXPERTS) for m in offered_metrics("causal_lm", has_labels=False))]
SMALLEST = {"image_classification", "diffusion"}
REPEATED = [pair if pair[1] in SMALLEST else pytest.param(*pair, marks=pytest.mark.slow) for pair in OFFERED]
"""The larger models are repeated in the slow suite."""
REFUSED = [pair for pair in PAIRS if pair not in OFFERED]


def test_every_task_has_a_model_here() -> None:
    assert set(MODELS) == {*TASKS, EXPERTS}


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    """On six samples the ranking of plans never settles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_fisher, "MOST_DRAWS", 2 * gram_fisher.DRAWS)
        yield


@dataclass(frozen=True)
class Run:
    """What a session gave for all units of a metric. `forwards` depend on what it had computed before."""

    plan: BlockPlan
    rows: tuple[ScoreRow, ...]
    forwards: float = field(compare=False)


@pytest.fixture(scope="module")
def session(tiny: Any) -> Callable[[str], Session]:
    """One session for all metrics of a task."""
    return cache(lambda task: Session(tiny(MODELS[task]).spec()))


@pytest.fixture(scope="module")
def run(session: Any) -> Callable[[str, str], Run]:
    """A metric on all layers and schemes of a task, measured once for all tests."""
    return cache(lambda metric, task: run_of(session(task), SCORERS[metric], reverse=False))


def plan_of(session: Session, metric: str) -> BlockPlan:
    layers = tuple(layer.name for layer in session.inventory.layers)
    layers = layers[:2] if metric in PAIRS_OF_CHOICES else layers
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


def run_of(session: Session, metric: Metric, *, reverse: bool) -> Run:
    """Every (layer, scheme), through units that went through JSON, in one order or the other."""
    plan = plan_of(session, metric.name)
    if metric.unit == "block":
        return block_run(session, metric, plan, reverse=reverse)
    units = choice_units(session, metric)
    results = {unit.key: session.run(unit) for unit in (reversed(units) if reverse else units)}
    rows = tuple(
        replace(row, draws=results[unit.key].arrays.get(draws_name(row.metric)))
        for unit in units
        for row in results[unit.key].scores
    )
    if metric.unit == "roles":
        rows = metric.load().combine(rows, decided(session))
    return Run(plan, rows, spent_in(results))


def choice_units(session: Session, metric: Metric) -> list[ScoreUnit]:
    """Every (layer, scheme); in a metric of roles, with the metric that decides the layer."""
    layers = [layer.name for layer in session.inventory.layers]
    names = decided(session) if metric.unit == "roles" else dict.fromkeys(layers, metric.name)
    return [ScoreUnit(layer, scheme, (names[layer],)) for layer in layers for scheme in SCHEMES]


def decided(session: Session) -> dict[str, str]:
    offered = offered_metrics(
        session.task_name,
        has_labels=session.samples.labels is not None,
        has_experts=bool(session.forwards.routers),
    )
    found: dict[str, str] = SCORERS[DECOUPLED].load().decide(session.inventory.layers, offered)
    return found


def block_run(session: Session, metric: Metric, plan: BlockPlan, *, reverse: bool) -> Run:
    scorer, done = metric.load(), {}
    while units := scorer.blocks(plan, {key: result.arrays for key, result in done.items()}):
        assert len({unit.key for unit in units}) == len(units)
        for unit in units[::-1] if reverse else units:
            assert unit.key not in done
            read = unit_from_json(json.loads(json.dumps(unit.as_json())))
            result = session.run(replace(read, given=unit.given))
            assert result.arrays
            assert all(np.isfinite(array).all() for array in result.arrays.values())
            done[unit.key] = result
    rows = scorer.combine(plan, {key: result.arrays for key, result in done.items()})
    return Run(plan, rows, spent_in(done))


def spent_in(results: Mapping[str, UnitResult]) -> float:
    return math.fsum(result.facts["forwards"] for result in results.values())


@pytest.mark.parametrize(("metric", "task"), WITH_EXPERTS)
def test_every_choice_gets_one_finite_row(metric: str, task: str, run: Any) -> None:
    found = run(metric, task)
    choices = sorted((layer, scheme) for layer in found.plan.layers for scheme in SCHEMES)
    assert sorted((row.layer, row.scheme) for row in found.rows) == choices
    for row in found.rows:
        assert row.metric == metric
        assert math.isfinite(row.value)
        assert row.stderr is None or (math.isfinite(row.stderr) and row.stderr >= 0)
        assert (row.stderr is None) == (row.samples == 0)


@pytest.mark.parametrize(("metric", "task"), OFFERED)
def test_draws_have_the_mean_and_the_standard_error_of_their_score(metric: str, task: str, run: Any) -> None:
    for row in run(metric, task).rows:
        if row.draws is not None:
            mean = float(row.draws.mean())
            value = max(mean, 0.0) if metric in AGAINST_THE_TRUTH else mean
            assert row.value == pytest.approx(value, rel=1e-9, abs=1e-15) or metric in UNEVEN
            assert row.stderr == pytest.approx(row.draws.std(ddof=1) / len(row.draws) ** 0.5, abs=1e-12)
            assert len(row.draws) == row.samples


@pytest.mark.parametrize(("metric", "task"), REPEATED)
def test_another_session_in_another_order_gives_the_same_rows(
    metric: str, task: str, run: Any, tiny: Any
) -> None:
    alone = Session(tiny(MODELS[task]).spec())
    assert run_of(alone, SCORERS[metric], reverse=True) == run(metric, task)


@pytest.mark.parametrize(("metric", "task"), WITH_EXPERTS)
def test_more_bits_are_better_on_average(metric: str, task: str, run: Any) -> None:
    """Single layers may be out of order; the mean over layers that matter is not. A token that is routed to
    another expert changes the outputs however little the weights changed, so fine schemes may tie there.
    """
    schemes = SCHEMES[:3] if task == EXPERTS else SCHEMES
    rows = run(metric, task).rows
    by_scheme = {scheme: [abs(row.value) for row in rows if row.scheme == scheme] for scheme in schemes}
    means = [float(np.mean(by_scheme[scheme])) for scheme in schemes]
    if metric in AGAINST_THE_TRUTH:
        assert all(mean >= 0 for mean in means)
        return
    expected = sorted(means, reverse=SCORERS[metric].direction == "min")
    assert means == expected
    assert len(set(means)) == len(schemes)


@pytest.mark.parametrize(("metric", "task"), REFUSED)
def test_a_metric_is_refused_where_it_cannot_be_measured(metric: str, task: str, session: Any) -> None:
    plan = plan_of(session(task), metric)
    if SCORERS[metric].unit == "choice":
        unit: Any = ScoreUnit(plan.layers[0], "w4", (metric,))
    else:
        unit = SCORERS[metric].load().blocks(plan, {})[0]
    with pytest.raises(MetricNotOffered, match=f"{metric} needs .* Offered are output_kl"):
        session(task).run(unit)


@pytest.mark.parametrize("entry", [*SCORERS, *TASKS])
def test_the_documentation_has_a_row_for_it(entry: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert f"\n| `{entry}`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("metric", SCORERS)
def test_a_metric_is_refused_in_the_wrong_kind_of_unit(metric: str, session: Any) -> None:
    wrong: Any = ScoreUnit("0", "w4", (metric,))
    if SCORERS[metric].unit == "choice":
        wrong = BlockUnit(metric, "samples:0:2", ("w4",), ("0",))
    with pytest.raises(BadUnit, match=f"Got '{metric}'"):
        session("generic").run(wrong)


@pytest.mark.parametrize(("metric", "task"), OFFERED)
def test_the_catalog_says_what_a_metric_costs(metric: str, task: str, run: Any) -> None:
    found, entry = run(metric, task), SCORERS[metric]
    settings = found.plan.settings
    work = Workload(
        len(found.plan.layers),
        len(found.plan.layers) * len(SCHEMES),
        found.plan.samples,
        settings.max_probes,
        settings.batch_size,
    )
    assert 0 <= found.forwards <= entry.forwards(work)
    if entry.unit == "block" and metric not in ADAPTIVE | PAIRS_OF_CHOICES:
        assert found.forwards == entry.forwards(work)


@pytest.mark.parametrize(("metric", "task"), CHOSEN)
def test_a_choice_that_reuses_nothing_costs_what_the_catalog_says(
    metric: str, task: str, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model at full precision, and once for the choice; no run begins in the middle, so none is checked."""
    found = session(task)
    whole = Forwards(
        found.model, found.task, found.samples, found.weights, found.spec.batch_size, prefix_bytes=0
    )
    monkeypatch.setattr(found, "forwards", whole)
    unit = ScoreUnit(found.inventory.layers[0].name, "w4", (metric,))
    samples = len(found.samples.parts["scoring"])
    work = Workload(layers=0, choices=1, samples=samples, probes=0, batch_size=found.spec.batch_size)
    assert found.run(unit).facts["forwards"] == SCORERS[metric].forwards(work)


@pytest.mark.parametrize("metric", SCORERS.values(), ids=SCORERS)
def test_a_scorer_has_the_parts_of_its_kind(metric: Metric) -> None:
    kinds = {
        "choice": ("score",),
        "block": ("blocks", "measure", "combine"),
        "roles": ("decide", "combine"),
    }
    wanted = kinds[metric.unit]
    scorer = metric.load()
    for name in wanted:
        assert inspect.getdoc(getattr(scorer, name)), name
    for text in (metric.summary, metric.source, metric.cost, inspect.getdoc(scorer)):
        assert text
    assert metric.version >= 1
