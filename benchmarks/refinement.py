"""What measuring plans is worth: additive, quadratic and refined plans side by side.

python benchmarks/refinement.py [--models DIR] [--menu rich|coarse] [--samples 64] [--evaluations 40]
                               [--metrics a,b] [--json FILE]

Trains the demo's language model into DIR unless it lies there. With the rich menu (the default one) and the
coarse one (w2, w3, w4, w8), each with and without ties of q/k/v and gate/up, every metric scores the scoring
part once. At 2.5, 3, 3.5, 4 and 5 stored bits per weight:

  additive METRIC   the exact program on one metric
  quadratic         of three mixing weights the plan that is best on the choosing part
  refined           what a search returns: candidates, rivals and local search on the choosing part

Cells are KL to full precision on the reporting part. Under each table: the refined plan's KL over that of
the best additive plan of any single metric, chosen afterwards on the reporting part itself, with the 95 %
interval of the paired ratio, and the plans that were measured for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.metrics import Bench, Scores, session_of
from benchmarks.quantizers import models, ratio
from quant.runtimes import default_menu
from search.compile import Assignment
from search.refine import CORRECTED, LOCAL, Measured, Refined, refine
from search.solve import solve
from sensitivity.catalog import SCORERS
from sensitivity.units import MeasureUnit
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, score_table
from service.planning.question import compile_ask
from service.runner.losses import every_other
from service.runner.rivals import candidates, rivals, screen

MENUS = {"rich": default_menu(), "coarse": ("w2", "w3", "w4", "w8")}
TIES = {
    "free": (),
    "tied": tuple(
        (f"model.layers.{block}.{names[0]}", *(f"model.layers.{block}.{name}" for name in names[1:]))
        for block in range(4)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )
    ),
}
BUDGETS = ("2.5", "3", "3.5", "4", "5")
METRICS = ("output_kl", "gram_output", "gram_fisher", "fisher", "output_mse", "weight_error")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One budget: KL per reporting sample of each search's plan, and what the refined one took."""

    budget: str
    divergence: Mapping[str, Floats]
    source: str
    moves: int
    plans: int
    seconds: float


class Judge:
    """Measures plans, each once."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._known = bench, dict[str, Floats]()

    def values(self, plan: Mapping[str, str], part: str) -> Floats:
        unit = MeasureUnit(tuple(plan.items()), part)  # type: ignore[arg-type]
        if unit.key not in self._known:
            self._known[unit.key] = np.asarray(self._bench.session.run(unit).arrays["divergence"], np.float64)
        return self._known[unit.key]

    def __call__(self, plans: Sequence[Assignment]) -> list[Measured]:
        found = []
        for plan in plans:
            values = self.values(plan, "choosing")
            whole = np.ones(len(values), dtype=bool)
            halves = tuple(float(values[every_other(whole, half)].mean()) for half in (0, 1))
            stderr = float(values.std(ddof=1) / len(values) ** 0.5)
            found.append(Measured(float(values.mean()), stderr, values, halves))
        return found


def cell_of(judge: Judge, inputs: PlanningInputs, ask: Ask, factor: Floats, evaluations: int) -> Cell:
    """All searches at one budget."""
    compiled = compile_ask(inputs, ask)
    solution = solve(compiled.problem)
    started, found = time.process_time(), candidates(inputs, ask, compiled, solution, factor)
    refined = refine(
        compiled,
        found + rivals(inputs, ask, compiled),
        judge,
        predicted=screen(inputs, ask, compiled, factor),
        evaluations=evaluations,
    )
    seconds = time.process_time() - started
    named = {one.source: dict(one.assignment) for one in found if one.source.startswith("additive")}
    means = {step.source: step.measured.mean for step in refined.trace}
    mixed = [one for one in found if one.source.startswith("quadratic")]
    best = min(mixed, key=lambda one: means.get(one.source, _measured(refined, dict(one.assignment))))
    named |= {"quadratic": dict(best.assignment), "refined": refined.assignment}
    moves = sum(step.source in (CORRECTED, LOCAL) for step in refined.trace)
    divergence = {name: judge.values(plan, "reporting") for name, plan in named.items()}
    return Cell(ask.budget, divergence, refined.source, moves, len(refined.trace), seconds)


def _measured(refined: Refined, plan: Assignment) -> float:
    return next(step.measured.mean for step in refined.trace if step.assignment == plan)


def scores_of(bench: Bench, names: Sequence[str]) -> dict[str, Scores]:
    found = bench.choice_metrics([name for name in names if SCORERS[name].unit == "choice"])
    return found | {name: bench.block_metric(name) for name in names if SCORERS[name].unit == "block"}


def print_table(menu: str, tie: str, cells: Sequence[Cell]) -> tuple[int, int]:
    """Print one table; (cells in which refined is worse beyond the interval, cells in which it is better)."""
    print(f"\n{menu} menu, {tie}\n\n| KL on the reporting part | {' | '.join(c.budget for c in cells)} |")
    print(f"|{'---|' * (1 + len(cells))}")
    for name in cells[0].divergence:
        print(f"| {name} | {' | '.join(short(c.divergence[name].mean()) for c in cells)} |")
    worse = better = 0
    shares = []
    for cell in cells:
        singles = {n: v for n, v in cell.divergence.items() if n.startswith("additive")}
        best = min(singles, key=lambda name: singles[name].mean())
        share, low, high = ratio(cell.divergence["refined"], singles[best])
        intervals = [ratio(cell.divergence["refined"], values) for values in singles.values()]
        worse += any(interval[1] > 1 for interval in intervals)
        better += high < 1
        shares.append(f"{share:.3f} [{low:.3f}, {high:.3f}] of {best.removeprefix('additive ')}")
    print(f"| refined / best additive | {' | '.join(shares)} |")
    print(f"| measured plans, of these moves | {' | '.join(f'{c.plans}, {c.moves}' for c in cells)} |")
    print(f"| refined plan found by | {' | '.join(c.source for c in cells)} |", flush=True)
    return worse, better


def short(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--menu", choices=MENUS, help="only this one")
    parser.add_argument("--samples", type=int, default=64, help="at most so many in each part")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--json", type=Path, help="also write every cell into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    metrics, written = options.metrics.split(","), []
    session = session_of(models(options.models, ["lm"]), "lm", options.samples)
    total: list[tuple[int, int]] = []
    for menu in [options.menu] if options.menu else MENUS:
        schemes = MENUS[menu]
        bench = Bench(session, schemes)
        scores = scores_of(bench, metrics)
        rows = [row for found in scores.values() for row in found.rows]
        inputs = PlanningInputs(
            session.inventory, score_table(session.inventory, schemes, rows, list(scores)), tuple(schemes)
        )
        factor, judge = scores["gram_output"].factor, Judge(bench)
        assert factor is not None
        for tie, ties in TIES.items():
            asks = [Ask(f"{bits} bpw", ties=ties, metric="output_kl") for bits in BUDGETS]
            cells = [cell_of(judge, inputs, ask, factor, options.evaluations) for ask in asks]
            total.append(print_table(menu, tie, cells))
            written += [told(menu, tie, cell) for cell in cells]
            if options.json:
                options.json.write_text(json.dumps(written, indent=1))
    worse, better = (sum(column) for column in zip(*total, strict=True))
    print(
        f"\nrefined is worse than some additive plan beyond the interval in {worse} of {len(written)} cells,"
    )
    print(f"better than the best additive plan beyond the interval in {better}")


def told(menu: str, tie: str, cell: Cell) -> dict[str, Any]:
    means = {name: float(values.mean()) for name, values in cell.divergence.items()}
    about = {"budget": cell.budget, "source": cell.source, "moves": cell.moves, "plans": cell.plans}
    return {"menu": menu, "ties": tie, **about, "seconds": cell.seconds, "kl": means}


if __name__ == "__main__":
    main()
