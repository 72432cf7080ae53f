"""Which metric to trust: what every metric costs on the demo's models, and how well it ranks measured plans.

python benchmarks/metrics.py [--models DIR] [--only lm|cnn] [--samples N] [--plans 60] [--metrics a,b]
                             [--schemes w2,w3]

Trains the demo's language model and CNN into DIR unless they lie there. On each, with the default menu of
schemes, every metric scores the scoring part; 60 random plans that fill the budget and 60 near the optimum of
output_kl are measured on the choosing part at 2.5, 3 and 4 stored bits per weight, and every metric, every
quadratic model and mixture is correlated with them. Cells are Spearman's rho with the 95 % interval.

`forwards` counts forward passes of one sample (a backward pass is 2); `seconds` is CPU time on one thread,
with quantized weights at hand. Metrics that read outputs share one pass per layer and scheme: their seconds
are those of that pass with all of them. The last lines say which of all that cost at most as much as the
default rank plans best, by the mean over budgets and both kinds of plans.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.quantizers import MODELS, models, session_of
from quant.runtimes import default_menu
from search.pairwise import factor_of
from search.refine import Measured
from sensitivity.catalog import SCORERS, offered_metrics
from sensitivity.gram import gram_matrix
from sensitivity.ranks import split_half
from sensitivity.session import Session
from sensitivity.units import BlockPlan, MeasureUnit, ScoreRow, ScoreUnit, draws_name
from service.planning.inputs import PlanningInputs, score_table
from service.runner.correlate_job import answer_of, sampled_plans
from service.runner.predictors import predictors
from service.runner.search_job import Search, asks_of
from service.wire import JobRequest

BUDGETS = ("2.5 bpw", "3 bpw", "4 bpw")
KINDS = ("random", "near")
SAMPLES = {"lm": 32, "cnn": 128}
"""In each part."""
PROBES = 32
"""Of hessian_trace per layer: its default of 128 at most takes four times as long."""
DEFAULT = "output_kl + 0.5 gram_output"
"""What the search ranks moves with."""


@dataclass
class Scores:
    """What one metric gave and took."""

    rows: list[ScoreRow]
    forwards: float
    seconds: float
    stability: float | None
    factor: NDArray[np.float64] | None = None


@dataclass
class Result:
    """One model: the metrics by name, and the answers of `bitplan correlate` by budget."""

    model: str
    scores: dict[str, Scores]
    answers: list[dict[str, Any]] = field(default_factory=list)
    judged: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Bench:
    """Scores and plans of one session."""

    def __init__(self, session: Session, menu: Sequence[str]) -> None:
        self.session = session
        self.menu = tuple(menu)
        self.layers = tuple(layer.name for layer in session.inventory.layers)
        for layer in self.layers:
            for scheme in self.menu:
                session.weights.quantized(layer, scheme)
        list(session.forwards.references("scoring"))

    def choice_metrics(self, names: Sequence[str]) -> dict[str, Scores]:
        """All in one pass; those without a pass apart."""
        passing = [name for name in names if SCORERS[name].sees_activations]
        found = self._choices(passing) if passing else {}
        for name in names:
            if name not in passing:
                found |= self._choices([name])
        return found

    def _choices(self, names: Sequence[str]) -> dict[str, Scores]:
        started = time.process_time()
        results = [
            self.session.run(ScoreUnit(layer, scheme, tuple(names)))
            for layer in self.layers
            for scheme in self.menu
        ]
        seconds = time.process_time() - started
        found = {}
        for name in names:
            rows = [row for result in results for row in result.scores if row.metric == name]
            draws = [result.arrays.get(draws_name(name)) for result in results]
            kept = [column for column in draws if column is not None]
            stability = split_half(np.stack(kept, axis=1)) if kept else None
            spent = sum(result.facts["forwards"] for result in results)
            forwards = spent if any(row.samples for row in rows) else 0
            found[name] = Scores(rows, forwards, seconds, stability)
        if "gram_output" in found:
            sketches = np.stack([np.asarray(result.arrays["sketch"]) for result in results])
            gram = gram_matrix(sketches)
            found["gram_output"].factor = factor_of(gram, len(self.layers), len(self.menu))
        return found

    def block_metric(self, name: str) -> Scores:
        session, scorer = self.session, SCORERS[name].load()
        plan = BlockPlan(self.layers, self.menu, len(session.samples.parts["scoring"]), session.spec)
        started, forwards = time.process_time(), 0.0
        done: dict[str, Any] = {}
        while units := scorer.blocks(plan, done):
            for unit in units:
                result = session.run(unit)
                done[unit.key], forwards = result.arrays, forwards + result.facts["forwards"]
        rows = list(scorer.combine(plan, done))
        seconds = time.process_time() - started
        by_layer = [[row.draws for row in rows if row.layer == layer] for layer in self.layers]
        kept = [np.stack(columns, axis=1) for columns in by_layer if all(c is not None for c in columns)]
        stability = split_half(*kept) if len(kept) == len(by_layer) else None
        factor = scorer.factor(plan, done) if name == "gram_fisher" else None
        return Scores(rows, forwards, seconds, stability, factor)

    def measure(self, plans: Sequence[Mapping[str, str]]) -> list[Measured]:
        known: dict[str, Measured] = {}
        found = []
        for plan in plans:
            unit = MeasureUnit(tuple(plan.items()), "choosing")
            if unit.key not in known:
                values = np.asarray(self.session.run(unit).arrays["divergence"], dtype=np.float64)
                error = float(values.std(ddof=1) / len(values) ** 0.5)
                known[unit.key] = Measured(float(values.mean()), error, values)
            found.append(known[unit.key])
        return found


def run(bench: Bench, model: str, names: Sequence[str], plans: int) -> Result:
    scores = bench.choice_metrics([name for name in names if SCORERS[name].unit == "choice"])
    for name in names:
        if SCORERS[name].unit == "block":
            print(f"{model}: {name}", file=sys.stderr, flush=True)
            scores[name] = bench.block_metric(name)
    inventory = bench.session.inventory
    rows = [row for found in scores.values() for row in found.rows]
    inputs = PlanningInputs(inventory, score_table(inventory, bench.menu, rows, list(scores)), bench.menu)
    request = JobRequest(
        model="m", calibration="c", budgets=list(BUDGETS), schemes=list(bench.menu), metrics=["output_kl"]
    )
    factors = {name: found.factor for name, found in scores.items() if found.factor is not None}
    search = Search(request, inputs, factors.get("gram_output"), {})
    result = Result(model, scores)
    for ask in asks_of(request):
        judged = predictors(inputs, ask, factors)
        result.judged = {one.name: one.metrics for one in judged}
        sampled = sampled_plans(search, ask, plans)
        measured = bench.measure([plan.assignment for plan in sampled.plans])
        result.answers.append(answer_of(sampled, judged, measured, request.seed))
        print(f"{model}: {ask.budget} measured", file=sys.stderr, flush=True)
    return result


# -- what is printed ------------------------------------------------------------------------------


def cost_of(result: Result, name: str) -> tuple[float, float]:
    """Forwards and seconds of everything that a score model is made of; the shared pass counts once."""
    made_of = {metric: result.scores[metric] for metric in result.judged[name]}
    shared = [found for metric, found in made_of.items() if SCORERS[metric].unit == "choice"]
    own = [found for metric, found in made_of.items() if SCORERS[metric].unit == "block"]
    return (
        max((found.forwards for found in shared), default=0.0) + sum(found.forwards for found in own),
        max((found.seconds for found in shared), default=0.0) + sum(found.seconds for found in own),
    )


def rhos(result: Result, name: str) -> dict[tuple[str, str], Mapping[str, float] | None]:
    """(kind, budget) -> Spearman's rho with its interval."""
    return {
        (row["plans"], answer["budget"]): row["spearman"]
        for answer in result.answers
        for row in answer["correlations"]
        if row["score"] == name
    }


def mean_rho(result: Result, name: str) -> float:
    found = rhos(result, name)
    values = [found[kind, budget] for kind in KINDS for budget in BUDGETS]
    return float(np.mean([-1.0 if value is None else value["value"] for value in values]))


def print_table(result: Result) -> None:
    heads = [f"{kind} {budget.removesuffix(' bpw')}" for kind in KINDS for budget in BUDGETS]
    print(f"\n{result.model}\n\n| score | forwards | seconds | two halves | mean | {' | '.join(heads)} |")
    print(f"|{'---|' * (5 + len(heads))}")
    for name in sorted(result.judged, key=lambda name: -mean_rho(result, name)):
        forwards, seconds = cost_of(result, name)
        stability = result.scores[name].stability if name in result.scores else None
        found = rhos(result, name)
        cells = [shown(found[kind, budget]) for kind in KINDS for budget in BUDGETS]
        halves = "" if stability is None else short(stability)
        mean = short(mean_rho(result, name))
        print(f"| `{name}` | {forwards:,.0f} | {seconds:.1f} | {halves} | {mean} | {' | '.join(cells)} |")
    reliable = [short(answer["plans"][kind]["reliability"]) for kind in KINDS for answer in result.answers]
    print(f"| reliability of the measured plans | | | | | {' | '.join(reliable)} |")


def shown(rho: Mapping[str, float] | None) -> str:
    return "-" if rho is None else f"{short(rho['value'])} [{short(rho['low'])}, {short(rho['high'])}]"


def short(value: float | None) -> str:
    """.97 for 0.97."""
    return "-" if value is None else f"{value:.2f}".replace("0.", ".", 1)


def verdict(results: Sequence[Result]) -> None:
    """The score models that cost at most as many forwards as the default, best first."""
    known = [name for name in results[0].judged if all(name in result.judged for result in results)]
    affordable = [
        name
        for name in known
        if all(cost_of(result, name)[0] <= cost_of(result, DEFAULT)[0] for result in results)
    ]
    means = {name: float(np.mean([mean_rho(result, name) for result in results])) for name in affordable}
    first, second, *_ = sorted(means, key=lambda name: -means[name])
    print(f"\nOf those that cost at most as much as `{DEFAULT}` ({short(means[DEFAULT])}):")
    print(f"first `{first}` ({means[first]:.3f}), second `{second}` ({means[second]:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--samples", type=int, help="at most so many in each part")
    parser.add_argument("--plans", type=int, default=60, help="random ones per budget, and near ones")
    parser.add_argument("--metrics", help="only these, comma separated; output_kl is always measured")
    parser.add_argument("--schemes", help="another menu than the default one, comma separated")
    parser.add_argument("--json", type=Path, help="also write the coefficients into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(MODELS)
    folder = models(options.models, names)
    results = []
    for name in names:
        menu = options.schemes.split(",") if options.schemes else default_menu()
        session = session_of(folder, name, options.samples or SAMPLES[name], max_probes=PROBES)
        bench = Bench(session, menu)
        offered = offered_metrics(bench.session.task_name, has_labels=True)
        asked = options.metrics.split(",") if options.metrics else offered
        metrics = [metric for metric in offered if metric in ("output_kl", "gram_output", *asked)]
        results.append(run(bench, MODELS[name][0], metrics, options.plans))
        print_table(results[-1])
        if options.json:
            options.json.write_text(json.dumps({r.model: r.answers for r in results}, indent=1))
    verdict(results)


if __name__ == "__main__":
    main()
