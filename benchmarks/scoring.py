"""What scoring costs: with and without reuse of blocks, and at 2, 12 and 40 schemes.

python benchmarks/scoring.py [--models DIR] [--only lm|cnn] [--samples N]

Trains the demo's language model and CNN into DIR unless they lie there. Seconds are CPU time on one thread,
quantized weights at hand except where `dW` says what making them takes; ratios are within one run.

1. one-at-a-time metrics of every layer at 4 schemes, beginning at the block that changes or running the whole
   model: seconds, forward passes of one sample, and whether the scores are equal
2. plans of a local search: 40, each with one or two other layers than the latest whose number eight divides
3. metrics of one backward pass per sample at 2, 12 and 40 schemes
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.quantizers import MODELS, models, session_of
from quant.schemes import parse_scheme
from sensitivity.catalog import SCORERS
from sensitivity.forwards import Assignment, Forwards
from sensitivity.scorers import gram_fisher
from sensitivity.session import Session
from sensitivity.units import Arrays, BlockPlan, ScoreUnit
from sensitivity.weights import LayerWeights

SAMPLES = {"lm": 32, "cnn": 128}
FEW = ("w2", "w3", "w4", "w8")
MENU = tuple(
    parse_scheme(f"w{bits}{kind}").name
    for kind in ("", "-asym", "-rtn", "-tensor", "-tensor-rtn", "-asym-rtn")
    for bits in (2, 3, 4, 5, 6, 7, 8)
)[:40]
ONE_PASS = ("fisher", "gram_fisher", "taylor", "gradient_output")
COUNTS = (2, 12, 40)
PLANS = 40


@dataclass(frozen=True)
class Cost:
    """CPU seconds and forward passes of one sample."""

    seconds: float
    forwards: float


def cost_of(session: Session, work: Callable[[], None]) -> Cost:
    before, start = session.forwards.spent, time.process_time()
    work()
    return Cost(time.process_time() - start, session.forwards.spent - before)


def with_forwards(session: Session, **bounds: int) -> None:
    """Forget what was kept; `prefix_bytes=0` runs the whole model each time."""
    session.forwards = Forwards(
        session.model,
        session.task,
        session.samples,
        session.weights,
        session.spec.batch_size,
        **bounds,
    )


def one_at_a_time(session: Session) -> None:
    cells = [(layer.name, scheme) for layer in session.inventory.layers for scheme in FEW]
    for layer, scheme in cells:
        session.weights.quantized(layer, scheme)
    found: list[list[float]] = []

    def score() -> None:
        units = (ScoreUnit(layer, scheme, ("output_kl", "gram_output")) for layer, scheme in cells)
        found.append([row.value for unit in units for row in session.run(unit).scores])

    costs = []
    for bounds in ({"prefix_bytes": 0}, {}):
        with_forwards(session, **bounds)
        costs.append(cost_of(session, score))
    report(f"output_kl + gram_output, {len(cells)} choices", *costs, equal=found[0] == found[1])


def local_search(session: Session) -> None:
    layers = [layer.name for layer in session.inventory.layers]
    generator = np.random.default_rng(0)
    plans = [dict.fromkeys(layers, "w4")]
    for number in range(PLANS - 1):
        base = plans[number // 8 * 8]
        moved = generator.choice(layers, size=generator.integers(1, 3), replace=False)
        plans.append({**base, **{str(name): str(generator.choice(FEW)) for name in moved}})
    assignments: list[Assignment] = [tuple(sorted(plan.items())) for plan in plans]
    for plan in assignments:
        for name, scheme in plan:
            session.weights.quantized(name, scheme)
    found: list[list[torch.Tensor]] = []

    def measure() -> None:
        found.append(
            [
                pair.outputs.rows.sum()
                for plan in assignments
                for pair in session.forwards.pairs("choosing", plan)
            ]
        )

    costs = []
    for bounds in ({"prefix_bytes": 0}, {}):
        with_forwards(session, **bounds)
        list(session.forwards.references("choosing"))
        costs.append(cost_of(session, measure))
    report(f"{PLANS} plans of a local search", *costs, equal=all(map(torch.equal, *found)))


def report(what: str, whole: Cost, reused: Cost, *, equal: bool) -> None:
    print(
        f"{what:<44}{whole.seconds:>8.2f} s{whole.forwards:>9.0f} passes  ->"
        f"{reused.seconds:>8.2f} s{reused.forwards:>9.0f} passes  time x{reused.seconds / whole.seconds:.2f}"
        f"  passes x{reused.forwards / whole.forwards:.2f}  {'equal' if equal else 'DIFFERENT'}"
    )


def one_pass(session: Session, metric: str) -> None:
    layers = tuple(layer.name for layer in session.inventory.layers)
    samples = len(session.samples.parts["scoring"])
    line, first = f"{metric:<16}", 0.0
    for count in COUNTS:
        schemes = MENU[:count]
        making(session.weights, layers, schemes)
        plan, scorer = BlockPlan(layers, schemes, samples, session.spec), SCORERS[metric].load()
        session.run(scorer.blocks(plan, {})[0])  # what the first one loads and allocates is nobody's cost
        start, done = time.process_time(), dict[str, Arrays]()
        while units := scorer.blocks(plan, done):
            done |= {unit.key: session.run(unit).arrays for unit in units}
        seconds = time.process_time() - start
        first = first or seconds
        line += f"{seconds:>10.2f} s x{seconds / first:.2f}"
    print(line)


def fresh(session: Session) -> LayerWeights:
    """Weights of which nothing has been quantized."""
    return LayerWeights(session.model, session.inventory, session.inputs)


def making(weights: LayerWeights, layers: Sequence[str], schemes: Sequence[str]) -> float:
    """CPU seconds that dW of every layer and scheme takes, where it is not kept."""
    start = time.process_time()
    for layer in layers:
        for scheme in schemes:
            weights.quantized(layer, scheme)
        weights.errors(layer, schemes)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--only", choices=list(MODELS), help="one model alone")
    parser.add_argument("--samples", type=int, help="in each part")
    given = parser.parse_args()
    names = [given.only] if given.only else list(MODELS)
    folder = models(given.models, names)
    for name in names:
        session = session_of(folder, name, given.samples or SAMPLES[name])
        blocks = session.forwards.resuming.blocks
        print(f"\n{MODELS[name][0]}: {len(session.inventory.layers)} layers, {len(blocks.paths)} blocks,"
              f" {len(session.samples.parts['scoring'])} samples")  # fmt: skip
        one_at_a_time(session)
        local_search(session)
        heads = "".join(f"{f'{count} schemes':>18}" for count in COUNTS)
        print(f"{'':<16}{heads}")
        names_of = [layer.name for layer in session.inventory.layers]
        made = [making(fresh(session), names_of, MENU[:count]) for count in COUNTS]
        print(f"{'making dW':<16}" + "".join(f"{seconds:>10.2f} s      " for seconds in made))
        for metric in ONE_PASS:
            one_pass(session, metric)
    print(
        f"\ngram_fisher: rounds of {gram_fisher.DRAWS} draws to its end. Times are CPU seconds on one thread."
    )


if __name__ == "__main__":
    main()
