"""Other tools' plans next to Bitplan's: the same model, menu, quantizer and stored bytes, measured alike.

python benchmarks/peer_plans.py [--folder DIR] [--only lm,cnn] [--seeds 0,1,2] [--peers modelopt,nncf]

Trains the demo's models into DIR for each seed. Each peer runs its own search in an environment of its own,
made on first use, at 2.5, 3, 3.5, 4 and 5 bits as the peer counts them, over the menu w2 w3 w4 w8 (per output
channel), with the scoring and the choosing part of the calibration data. Its plan is then one of Bitplan's
schemes per layer with exact stored bytes, and the search of `bitplan run` gets just those bytes: its scores
see the scoring part, its moves the choosing part. Both plans are measured with Bitplan's quantizer on the
reporting part.

A cell is our KL over the peer's for each seed. `=` is one and the same plan or two that cannot be told apart
within the 95 % interval of the paired difference, `**1.03**` a cell that we lose beyond it. What is no plain
win is listed below with both numbers. Answers lie in DIR: run again to go on, delete them to begin again.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import PeerFailed, cache_folder
from benchmarks.peer_cells import BUDGETS, Cell, close_ones, counted, table
from benchmarks.peer_tools import PEERS, Answer, Peer, ask
from benchmarks.quantizers import MODELS
from quant.costs import bits_per_weight
from quant.layers import Inventory
from quant.plan import plan_from_json
from quant.schemes import parse_scheme
from sensitivity.session import Session
from sensitivity.spec import SessionSpec
from sensitivity.units import MeasureUnit
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings

MENU = ("w2", "w3", "w4", "w8")
SAMPLES = {"lm": 32, "cnn": 128}
"""In each part; a peer has two parts."""
LENGTH = 128
TITLES = {"lm": "Language model", "cnn": "CNN"}


def stored_bytes(inventory: Inventory, plan: Mapping[str, str]) -> int:
    """Bytes of a plan, scales included."""
    return sum(parse_scheme(plan[layer.name]).storage(layer.matrix).bytes for layer in inventory.layers)


# -- one trained model ----------------------------------------------------------------------------


class Bench:
    """One kind of model of one seed: its session, what peers answered, and our plans."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.folder = folder / f"seed-{seed}" / kind
        file = MODELS[kind][1]
        self.model = trained(folder / f"seed-{seed}", kind, seed)
        self.calibration = self.model / file
        self.parameters = {
            "schemes": list(MENU),
            "samples": SAMPLES[kind],
            "sequence_length": LENGTH,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.session = Session(self._spec())
        self.inventory = self.session.inventory
        self.samples = self._save_samples()

    def _spec(self) -> SessionSpec:
        with self._local() as local:
            request = self._request(local, ["5 bpw"])
        return spec_of(request, folder_source(self.model), file_data(self.calibration).source)

    def _local(self) -> Local:
        return Local(Settings(data_dir=self.folder / "bitplan", workers=1))

    def _request(self, local: Local, budgets: Sequence[str]) -> Any:
        model, data = local.model(folder_source(self.model)), local.calibration(file_data(self.calibration))
        return local.request(model, data, {**self.parameters, "budgets": list(budgets)})

    def _save_samples(self) -> Path:
        """Both parts that our search sees, with labels; those of text are the tokens themselves."""
        samples = self.session.samples
        rows = np.concatenate([samples.parts["scoring"], samples.parts["choosing"]])
        tensors = {name: tensor[rows].contiguous() for name, tensor in samples.tensors.items()}
        labels = tensors["input_ids"] if samples.labels is None else samples.labels[rows]
        file = self.folder / "samples.safetensors"
        save_file({**tensors, "labels": labels.clone()}, file)
        return file

    def ask(self, peer: Peer) -> Answer:
        """The peer's answer, from DIR if it lies there. Raises PeerFailed."""
        name = f"{peer.environment} {peer.option}".strip().replace(" ", "-")
        return ask(peer, self.folder / name, self.asked(peer))

    def asked(self, peer: Peer) -> dict[str, Any]:
        """What goes into asked.json."""
        return {
            "model": str(self.model.absolute()),
            "kind": self.kind,
            "layers": [layer.name for layer in self.inventory.layers],
            "schemes": list(MENU),
            "budgets": list(BUDGETS),
            "samples": str(self.samples.absolute()),
            "option": peer.option,
        }

    def ours(self, sizes: Sequence[int]) -> dict[int, dict[str, str]]:
        """Bytes -> the plan of `bitplan run` that has at most so many, from one job."""
        if not sizes:
            return {}
        with self._local() as local:
            job = local.run(self._request(local, [f"bytes<={size}" for size in sizes]))
            if job.state != "succeeded":
                raise RuntimeError(f"our own search must succeed. Got {job.state}: {job.problem}")
            plans = [plan_from_json(plan["document"]) for plan in local.plans(job.id)]
        return dict(zip(sizes, [plan.assignment for plan in plans], strict=True))

    def measure(self, plan: Mapping[str, str]) -> NDArray[np.float64]:
        """KL per sample of the reporting part."""
        unit = MeasureUnit(tuple(plan.items()), "reporting")
        return np.asarray(self.session.run(unit).arrays["divergence"], dtype=np.float64)


def trained(folder: Path, kind: str, seed: int) -> Path:
    """The demo's model of this seed."""
    place = folder / MODELS[kind][0]
    if not (place / "config.json").is_file():
        script = Path(__file__).parents[1] / "examples" / "train_demo_models.py"
        command = [
            sys.executable,
            script,
            "--out",
            folder,
            "--only",
            kind,
            "--seed",
            str(seed),
            "--threads",
            "1",
        ]
        subprocess.run(command, check=True)  # noqa: S603 - a command of ours
    return place


def compared(bench: Bench, peers: Sequence[Peer]) -> tuple[list[Cell], dict[str, Answer], dict[str, str]]:
    """The cells of one trained model; what each peer answered, or why it did not."""
    answers: dict[str, Answer] = {}
    failed: dict[str, str] = {}
    for peer in peers:
        print(f"{bench.kind}, seed {bench.seed}: {peer.name}", file=sys.stderr, flush=True)
        try:
            answers[peer.name] = bench.ask(peer)
        except PeerFailed as error:
            failed[peer.name] = str(error)
    wanted = [
        (name, budget, plan, stored_bytes(bench.inventory, plan))
        for name, answer in answers.items()
        for budget, plan in answer.plans.items()
    ]
    ours = bench.ours(sorted({size for *_, size in wanted}))
    cells = [
        Cell(
            name,
            bench.kind,
            bench.seed,
            budget,
            size,
            bits_per_weight(size, bench.inventory.parameters),
            bench.measure(plan),
            bench.measure(ours[size]),
            dict(plan) == ours[size],
        )
        for name, budget, plan, size in wanted
    ]
    return cells, answers, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peer-plans")
    parser.add_argument("--only", default=",".join(TITLES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--peers", help="only those whose environments are named, comma separated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.peers.split(",") if options.peers else [peer.environment for peer in PEERS]
    peers = [peer for peer in PEERS if peer.environment in chosen]
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{where}, {datetime.now(UTC):%Y-%m-%d}")
    everything: list[Cell] = []
    versions: dict[str, str] = {}
    for kind in options.only.split(","):
        cells, failed = [], {}
        for seed in map(int, options.seeds.split(",")):
            found, answers, refused = compared(Bench(options.folder, kind, seed), peers)
            cells += found
            failed |= refused
            versions |= {name: answer.version for name, answer in answers.items()}
        print(f"\n{TITLES[kind]}\n")
        print("\n".join(table(kind, cells, failed, [peer.name for peer in peers])), flush=True)
        everything += cells
    print(f"\n{counted(everything)}\n")
    print("\n".join(close_ones(everything)))
    print(f"\n{'; '.join(dict.fromkeys(versions.values()))}")


if __name__ == "__main__":
    main()
