"""Scoring time of the demo's language model next to ModelOpt's and AutoRound's, at 4 and at 40 schemes.

python benchmarks/peer_times.py [--models DIR] [--samples 32] [--repeats 3]

Everybody scores the same layers, sequences and schemes: symmetric integers, first w2 w3 w4 w8 per output
channel, then 40 of 2 to 8 bits in six granularities. A time is CPU seconds on one thread from a loaded model
to scores, quantizing the weights included and, of the peers, one solve. The sides take turns; medians of the
repetitions, in brackets the least and the most. Peers run in environments of their own (peer_plans.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peer_tools import AUTOROUND, MODELOPT, Peer, ask
from benchmarks.quantizers import models, session_of
from sensitivity.catalog import SCORERS
from sensitivity.session import Session
from sensitivity.units import Arrays, BlockPlan

FEW = ("w2", "w3", "w4", "w8")
GROUPS = ("", "-tensor", "-g96", "-g48", "-g32", "-g16")
MANY = tuple(f"w{bits}{group}" for group in GROUPS for bits in range(2, 9))[:40]
METRICS = (("fisher", None), ("gram_fisher", 1), ("gram_fisher", None))
"""With the number of rounds: gram_fisher draws until the ranking of plans is stable, 4 draws per round."""
TIMED = (
    Peer("ModelOpt gradient", *MODELOPT, "gradient max"),
    Peer("ModelOpt gradient, no ties", *MODELOPT, "gradient untied max"),
    Peer("AutoRound AutoScheme", *AUTOROUND),
)
BASE = TIMED[0].name


def own(metric: str, rounds: int | None, folder: Path, samples: int, schemes: Sequence[str]) -> float:
    """Seconds of one metric of ours for all layers and schemes, from a session that has scored nothing."""
    session = session_of(folder, "lm", samples)
    assert session.model is not None
    start = time.process_time()
    layers = tuple(layer.name for layer in session.inventory.layers)
    plan = BlockPlan(layers, tuple(schemes), len(session.samples.parts["scoring"]), session.spec)
    scorer, done, spent = SCORERS[metric].load(), dict[str, Arrays](), 0
    while spent != rounds and (units := scorer.blocks(plan, done)):
        done |= {unit.key: session.run(unit).arrays for unit in units}
        spent += 1
    if rounds is None:
        scorer.combine(plan, done)
    return time.process_time() - start


def theirs(peer: Peer, session: Session, model: Path, schemes: Sequence[str]) -> float:
    """Seconds of a peer's search for the same layers, samples and schemes."""
    with tempfile.TemporaryDirectory() as name:
        tokens = session.samples.tensors["input_ids"][session.samples.parts["scoring"]].contiguous()
        save_file({"input_ids": tokens, "labels": tokens.clone()}, Path(name) / "samples.safetensors")
        asked = {
            "model": str(model.absolute()),
            "kind": "lm",
            "layers": [layer.name for layer in session.inventory.layers],
            "schemes": list(schemes),
            "budgets": [4.5],
            "samples": str(Path(name) / "samples.safetensors"),
            "option": peer.option,
        }
        return ask(peer, Path(name), asked).seconds


def print_table(times: dict[str, list[list[float]]]) -> None:
    base = [statistics.median(column) for column in times[BASE]]
    heads = [f"{len(menu)} schemes | of {BASE}" for menu in (FEW, MANY)]
    print(f"| scores from | {' | '.join(heads)} | growth |\n|{'---|' * 6}")
    for name, columns in times.items():
        medians = [statistics.median(column) for column in columns]
        cells = [
            f"{median:.2f} s [{min(column):.2f}, {max(column):.2f}] | {median / of:.2f}"
            for median, column, of in zip(medians, columns, base, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} | {medians[1] / medians[0]:.2f} x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = models(options.models, ["lm"])
    session = session_of(folder, "lm", options.samples)
    runs: dict[str, Callable[[Sequence[str]], float]] = {
        f"Bitplan {metric}{', one round' if rounds else ''}": partial(
            own, metric, rounds, folder, options.samples
        )
        for metric, rounds in METRICS
    }
    for peer in TIMED:
        runs[peer.name] = partial(theirs, peer, session, folder / "topics-llama")
    times: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    for repeat in range(options.repeats):
        for name, run in runs.items():
            for column, menu in zip(times[name], (FEW, MANY), strict=True):
                column.append(run(menu))
            print(f"{repeat + 1}: {name} {times[name]}", file=sys.stderr, flush=True)
    where = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{where}, torch {torch.__version__}, {options.samples} sequences, {options.repeats} repetitions\n")
    print_table(times)


if __name__ == "__main__":
    main()
