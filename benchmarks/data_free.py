"""Plans made with data-free calibration next to plans made with real data, all measured on real data.

python benchmarks/data_free.py [--models DIR] [--only lm|cnn] [--samples 32]

Trains the demo's language model and CNN into DIR unless they lie there. Statistics of the quantizer (GPTQ)
and scores (one-layer divergence, exact program) come from each kind of data; quality is KL to full precision
on the reporting part of the real data, with the ratio to the plan from real data and its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.quantizers import BUDGETS, MODELS, Bench, Cell, models, session_of, shown
from sensitivity.catalog import DATA_FREE
from sensitivity.data_free.session import MakingSession
from sensitivity.session import Session
from sensitivity.spec import DataSource
from service.made_calibration import units_of
from service.wire import MakeCalibrationRequest

METHODS = {"lm": ("generated_tokens", "random_tokens"), "cnn": ("batch_norm_images",)}
LENGTH = 128


def made(real: Session, method: str, samples: int, file: Path) -> Session:
    """A session on data made by `method`."""
    asked = {"method": method, "samples": 3 * samples, "sequence_length": LENGTH}
    images = DATA_FREE[method].makes == "images"
    shape = list(next(iter(real.samples.tensors.values())).shape[1:]) if images else []
    request = MakeCalibrationRequest.model_validate({**asked, "shape": shape})
    maker = MakingSession(real.spec)
    parts = [maker.run(unit).arrays for unit in units_of(request)]
    save_file({name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}, file)
    return Session(replace(real.spec, calibration=DataSource(str(file), "safetensors", method)))


def plans(real: Session, source: Session | None) -> list[Cell]:
    """Plans for every budget with scores and statistics of `source`, measured on the real reporting part."""
    if source is None:
        return list(Bench(real, ()).plans("gptq"))
    judge = Session(replace(real.spec, statistics=source.spec))
    return list(Bench(source, (), judge).plans("gptq"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--samples", type=int, default=32, help="at most so many in each part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(MODELS)
    folder = models(options.models, names)
    for name in names:
        real = session_of(folder, name, options.samples)
        baseline = plans(real, None)
        print(f"\n{MODELS[name][0]}\n| | {' | '.join(BUDGETS)} |\n|{'---|' * (len(BUDGETS) + 1)}")
        print(f"| real | {' | '.join(shown(cell, None) for cell in baseline)} |", flush=True)
        for method in METHODS[name]:
            source = made(real, method, options.samples, folder / f"{method}.safetensors")
            cells = zip(plans(real, source), baseline, strict=True)
            print(f"| {method} | {' | '.join(shown(cell, base) for cell, base in cells)} |", flush=True)


if __name__ == "__main__":
    main()
