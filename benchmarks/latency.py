"""How well the sum of measured kernels predicts a whole model's latency here, and the roofline beside it.

python benchmarks/latency.py [--blocks 20] [--hidden 512] [--plans 10] [--batch 1] [--dtype bfloat16]

Builds a Llama-type model with random weights (latency does not depend on them), draws random plans, puts the
real kernel of every layer's scheme into the model, and times whole forward passes. Prints one row per plan,
then the largest and mean errors and Spearman's rank correlation for three predictions:

  table            the layers' measured kernels, summed, and the rest of the model: what a pass takes with w4
                   everywhere, less the table's sum for that. Kernels are timed before and after the plans,
                   because other work on the machine comes and goes
  layers alone     the same sum without the rest: what `latency_ns` of a plan holds
  roofline         the profile cpu-avx512, summed, and the same rest
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quant.devices import DEVICES
from quant.inventory import take_inventory
from quant.latency import Timing, case_of, cases, measured_latency, roofline_latency
from quant.layers import Inventory
from quant.schemes import parse_schemes
from sensitivity.kernels import KERNELS, time_case

MENU = parse_schemes("w4,w4-g32,w8,w8-asym")
"""4-bit kernel with large and small groups, 8-bit kernel, and one that runs dequantized."""
WARM_UP, REPEATS = 5, 31


class Kernel(nn.Module):
    """A layer that runs in the kernel of its scheme."""

    def __init__(self, weight: Tensor, kernel: str, group: int) -> None:
        super().__init__()
        self.run = KERNELS[kernel](weight, group)
        self.rows, self.columns = weight.shape

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(inputs.reshape(-1, self.columns)).reshape(*inputs.shape[:-1], self.rows)


def build(options: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=int(options.hidden * 2.75) // 64 * 64,
        num_hidden_layers=options.blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()


def end_to_end(model: nn.Module, batch: int) -> float:
    """Median nanoseconds of one pass over `batch` single tokens, in time of this thread's processor: what a
    pass takes on a core of its own, also where the machine is shared.
    """
    tokens = torch.arange(batch).reshape(batch, 1)
    samples = []
    with torch.inference_mode():
        for turn in range(WARM_UP + REPEATS):
            before = time.thread_time_ns()
            model(input_ids=tokens)
            if turn >= WARM_UP:
                samples.append(time.thread_time_ns() - before)
    return statistics.median(samples)


def with_kernels(
    model: nn.Module, inventory: Inventory, plan: Mapping[str, str], batch: int
) -> dict[str, nn.Module]:
    """Replace every layer by its kernel; gives the modules that were there."""
    schemes = {scheme.name: scheme for scheme in MENU}
    before = {}
    for layer in inventory.layers:
        case = case_of(layer, schemes[plan[layer.name]], batch)
        parent, _, name = layer.name.rpartition(".")
        owner = model.get_submodule(parent)
        before[layer.name] = getattr(owner, name)
        setattr(owner, name, Kernel(before[layer.name].weight.data, case.kernel, case.group))
    return before


def timed_plan(model: nn.Module, inventory: Inventory, plan: Mapping[str, str], batch: int) -> float:
    modules = with_kernels(model, inventory, plan, batch)
    found = end_to_end(model, batch)
    restore(model, modules)
    return found


def restore(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def random_plans(inventory: Inventory, count: int) -> list[dict[str, str]]:
    """Plans that lean to different schemes, so that their latencies differ."""
    generator = np.random.default_rng(0)
    plans = []
    for _ in range(count):
        weights = generator.dirichlet([0.5] * len(MENU))
        names = generator.choice([scheme.name for scheme in MENU], size=len(inventory.layers), p=weights)
        plans.append({layer.name: str(name) for layer, name in zip(inventory.layers, names, strict=True)})
    return plans


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, two)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options)
    inventory = take_inventory(model)
    wanted = cases(inventory.layers, MENU, options.batch)
    print(f"{options.blocks} blocks, {len(inventory.layers)} layers, {inventory.parameters:,} weights")
    cheapest = {layer.name: MENU[0].name for layer in inventory.layers}
    plans = random_plans(inventory, options.plans)
    found, uniform = [], []
    before = [time_case(case) for case in wanted]
    for plan in plans:
        uniform.append(timed_plan(model, inventory, cheapest, options.batch))
        found.append(timed_plan(model, inventory, plan, options.batch))
    after = [time_case(case) for case in wanted]
    timings = {
        case.key: Timing((first.median_ns + last.median_ns) / 2, first.spread_ns, first.repeats)
        for case, first, last in zip(wanted, before, after, strict=True)
    }
    measured = measured_latency(inventory.layers, MENU, options.batch, timings)
    roofline = roofline_latency(inventory.layers, MENU, options.batch, DEVICES["cpu-avx512"])
    rows = []
    for plan, taken in zip(plans, found, strict=True):
        layers = float(sum(measured[name][scheme] for name, scheme in plan.items()))
        rows.append((taken, layers, layers, float(sum(roofline[n][s] for n, s in plan.items()))))
    rest = statistics.median(uniform) - float(sum(measured[name][MENU[0].name] for name in cheapest))
    print(f"rest of the model {rest / 1e6:.2f} ms")
    report(np.array(rows) + np.array([0, rest, 0, rest]))


def report(rows: np.ndarray) -> None:
    print("  end to end         table  layers alone      roofline")
    for row in rows:
        print("  ".join(f"{value / 1e6:9.3f} ms" for value in row))
    for column, name in enumerate(("table", "layers alone", "roofline"), 1):
        errors = np.abs(rows[:, column] / rows[:, 0] - 1)
        print(
            f"{name:14} error mean {errors.mean():6.1%}  largest {errors.max():6.1%}"
            f"  Spearman {spearman(rows[:, 0], rows[:, column]):.3f}"
        )


if __name__ == "__main__":
    main()
