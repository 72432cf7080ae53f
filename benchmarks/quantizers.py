"""Every quantizer of integer formats side by side: uniform schemes, and plans of a menu with that quantizer.

python benchmarks/quantizers.py [--models DIR] [--only lm|cnn] [--samples 64] [--quantizers rtn,gptq]

Trains the demo's language model and CNN into DIR unless they lie there. For each quantizer, on the same model
and data:

  uniform   every layer in one format: per channel at 2, 3 and 4 bits, and small asymmetric groups
  plans     the menu w2 w3 w4 w5 w6 w8 with that quantizer, one-layer KL on the scoring part, exact program
            at 2.5, 3, 3.5 and 4 stored bits per weight; no measured moves, so only quantizers differ

Quality is KL to full precision on the reporting part, which neither statistics nor scores have seen, with its
95 % interval; beside it the ratio to rtn's KL in the same row, with the interval of the paired ratio. A CNN
is measured with the correction batch_norm too. `seconds` is the time to quantize the whole model once at w4.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant.catalog import QUANTIZERS
from quant.costs import bits_per_weight, resources
from quant.digest import folder_digest
from quant.schemes import parse_scheme
from search.budget import parse_budget
from search.compile import compile_problem
from search.solve import solve
from sensitivity.catalog import SCORERS
from sensitivity.evidence import mean_interval
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.table import MetricTable, ScoreTable, TableLayer
from sensitivity.units import MeasureUnit, ScoreUnit

MODELS = {
    "lm": ("topics-llama", "calibration.jsonl", "jsonl", ()),
    "cnn": ("digits-resnet", "calibration.safetensors", "safetensors", ("batch_norm",)),
}
ORDER = ("rtn", "mse_clip", "hqq", "gptq", "awq", "adaround", "adaquant")
UNIFORM = ("w2", "w3", "w4", "w2-g32-asym", "w3-g32-asym", "w3-g64-asym", "w4-g64-asym")
MENU = ("w2", "w3", "w4", "w5", "w6", "w8")
BUDGETS = ("2.5 bpw", "3 bpw", "3.5 bpw", "4 bpw")
TIMED = "w4"


@dataclass(frozen=True)
class Cell:
    """One measured assignment: KL per sample, and stored bits per weight."""

    divergence: NDArray[np.float64]
    bits: float


def models(folder: Path, names: Sequence[str]) -> Path:
    """The folder with both trained models."""
    missing = [name for name in names if not (folder / MODELS[name][0] / "config.json").is_file()]
    script = Path(__file__).parents[1] / "examples" / "train_demo_models.py"
    for name in missing:
        subprocess.run([sys.executable, script, "--out", folder, "--only", name], check=True)  # noqa: S603 - a command of ours
    return folder


def session_of(folder: Path, name: str, samples: int, **settings: Any) -> Session:
    """A session on a trained model of `folder`, with so many samples in each part."""
    model, file, kind, _ = MODELS[name]
    place = folder / model
    source = ModelSource("folder", str(place), folder_digest(place)[0])
    data = DataSource(str(place / file), kind, "benchmark")
    return Session(SessionSpec(source, data, samples=samples, sequence_length=128, threads=1, **settings))


def spelled(scheme: str, quantizer: str) -> str:
    return parse_scheme(f"{scheme}-{quantizer}").name


class Bench:
    """Measurements of one model; the scores of a quantizer are those of its own weights.

    `judge` measures assignments where the session that scores has other data.
    """

    def __init__(self, session: Session, corrections: tuple[str, ...], judge: Session | None = None) -> None:
        self.session, self.corrections, self.judge = session, corrections, judge or session
        self.layers = session.inventory.layers

    def uniform(self, scheme: str) -> Cell | None:
        """None where a layer refuses the scheme: its own format there would make rows incomparable."""
        parsed = parse_scheme(scheme)
        if any(parsed.refuses(layer) for layer in self.layers):
            return None
        return self.measure({layer.name: scheme for layer in self.layers})

    def measure(self, assignment: Mapping[str, str]) -> Cell:
        unit = MeasureUnit(tuple(assignment.items()), "reporting", self.corrections)
        stored = sum(
            parse_scheme(assignment[layer.name]).storage(layer.matrix).bytes for layer in self.layers
        )
        bits = bits_per_weight(stored, self.session.inventory.parameters)
        return Cell(np.asarray(self.judge.run(unit).arrays["divergence"]), bits)

    def plans(self, quantizer: str) -> Iterator[Cell]:
        schemes = [spelled(scheme, quantizer) for scheme in MENU]
        values = np.array(
            [
                [self.session.run(ScoreUnit(layer.name, s, ("output_kl",))).scores[0].value for s in schemes]
                for layer in self.layers
            ]
        )
        table = ScoreTable(
            tuple(TableLayer(x.name, x.parameters, x.macs, None, x.role) for x in self.layers),
            tuple(schemes),
            {"output_kl": MetricTable(SCORERS["output_kl"].direction, values, np.full_like(values, np.nan))},
            resources(self.layers, [parse_scheme(s) for s in schemes], None, None),
        )
        for budget in BUDGETS:
            compiled = compile_problem(
                table,
                metric="output_kl",
                limits=parse_budget(budget).limits,
                ties=[],
                pins={},
                schemes=schemes,
            )
            solution = solve(compiled.problem)
            assert solution.choice is not None, budget
            yield self.measure(compiled.assignment(solution.choice))

    def seconds(self, quantizer: str) -> float:
        """Statistics of inputs are at hand before the clock starts."""
        scheme = parse_scheme(f"{TIMED}-{quantizer}")
        if scheme.needs_inputs:
            for layer in self.layers:
                self.session.inputs(layer.name)
        start = time.perf_counter()
        for layer in self.layers:
            self.session.weights.quantized(layer.name, scheme.name)
        return time.perf_counter() - start


def ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float, float]:
    """Ratio of the means of paired samples, with its 95 % interval by the delta method."""
    share = float(ours.mean() / theirs.mean())
    spread = mean_interval(ours - share * theirs)
    half = (spread.high - spread.mean) / float(theirs.mean())
    return share, share - half, share + half


def shown(cell: Cell | None, baseline: Cell | None) -> str:
    if cell is None:
        return "-"
    found = mean_interval(cell.divergence)
    text = f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"
    if baseline is None or baseline is cell:
        return text
    share, low, high = ratio(cell.divergence, baseline.divergence)
    return f"{text} {share:.2f}x [{low:.2f}, {high:.2f}]"


def run(bench: Bench, quantizers: Sequence[str], title: str) -> None:
    print(f"\n{title}: KL on {len(bench.session.samples.parts['reporting'])} samples", flush=True)
    print(f"| | {' | '.join(quantizers)} |\n|{'---|' * (len(quantizers) + 1)}", flush=True)
    if not bench.corrections:
        print(
            "| seconds, " + TIMED + " | " + " | ".join(f"{bench.seconds(q):.2f}" for q in quantizers) + " |"
        )
    for scheme in UNIFORM:
        cells = {name: bench.uniform(spelled(scheme, name)) for name in quantizers}
        print_row(scheme, cells)
    plans = {name: list(bench.plans(name)) for name in quantizers}
    for row, budget in enumerate(BUDGETS):
        print_row(f"plan {budget}", {name: cells[row] for name, cells in plans.items()})


def print_row(label: str, cells: Mapping[str, Cell | None]) -> None:
    known = [cell.bits for cell in cells.values() if cell is not None]
    if not known:
        return
    bits = f"{min(known):.3f}" if max(known) - min(known) < 5e-4 else f"{min(known):.3f} to {max(known):.3f}"
    baseline = cells.get("rtn")
    values = " | ".join(shown(cell, baseline) for cell in cells.values())
    print(f"| {label} ({bits} bits) | {values} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--samples", type=int, default=64, help="at most so many in each part")
    parser.add_argument("--quantizers", default=",".join(ORDER))
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(MODELS)
    quantizers = [name for name in options.quantizers.split(",") if name in QUANTIZERS]
    folder = models(options.models, names)
    for name in names:
        session = session_of(folder, name, options.samples)
        for corrections in dict.fromkeys([(), MODELS[name][3]]):
            title = " with ".join([MODELS[name][0], *corrections])
            run(Bench(session, corrections), quantizers, title)


if __name__ == "__main__":
    main()
