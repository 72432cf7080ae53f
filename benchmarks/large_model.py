"""One-pass gradient metrics on a large Llama-shaped model with random bf16 weights, under a limit on memory.

    python benchmarks/large_model.py                 # about 1.1 billion weights, 2 GiB
    python benchmarks/large_model.py --growth        # how time, memory and passes grow, on fewer layers

Weights are drawn shard by shard into a temporary folder, which is deleted at the end. The peak is that of the
worker process (RssAnon); passes are forward passes of one sample, a backward counts 2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from quant.digest import INDEX
from search.budget import parse_bytes
from sensitivity.catalog import SCORERS
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockPlan, InspectUnit, Unit, UnitResult
from service.executors.catalog import make_executor
from service.executors.protocol import Executor, ExecutorSettings

HIDDEN, INNER, HEADS, CACHED_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32_000
SCHEMES = "w8-rtn,w4-rtn,w4-g128-rtn,w3-g128-rtn,w4-g128,mxfp4"


@dataclass(frozen=True)
class Shape:
    """What is measured: layers of the model, samples of so many tokens, schemes."""

    layers: int
    samples: int
    tokens: int
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What the worker needed; bytes are anonymous."""

    seconds: float
    peak_bytes: int
    forwards: float
    streamed: bool


def main() -> None:
    asked = _arguments()
    shape = Shape(asked.layers, asked.samples, asked.tokens, tuple(asked.schemes.split(",")))
    limit = parse_bytes(asked.memory_limit)
    print(f"{asked.metric}, limit {limit / 2**20:,.0f} MiB, {asked.threads} threads")
    print(f"{'layers':>7}{'weights':>16}{'samples':>9}{'schemes':>9}{'seconds':>9}{'MiB':>7}{'passes':>8}")
    for one in _growth(shape) if asked.growth else [shape]:
        with tempfile.TemporaryDirectory(prefix="bitplan-large-") as folder:
            weights = write_model(Path(folder), one.layers)
            found = measure(Path(folder), one, asked.metric, limit, asked.threads)
        mode = "streamed" if found.streamed else "whole"
        print(
            f"{one.layers:>7}{weights:>16,}{one.samples:>9}{len(one.schemes):>9}{found.seconds:>9.0f}"
            f"{found.peak_bytes / 2**20:>7.0f}{found.forwards:>8.1f}  {mode}",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--schemes", default=SCHEMES)
    of_blocks = [name for name, metric in SCORERS.items() if metric.unit == "block"]
    parser.add_argument("--metric", default="fisher", choices=of_blocks)
    parser.add_argument("--memory-limit", default="2 GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", action="store_true", help="vary layers, schemes and samples one by one")
    return parser.parse_args()


def _growth(shape: Shape) -> Iterator[Shape]:
    base = replace(shape, layers=2, samples=8)
    yield base
    yield from (replace(base, layers=layers) for layers in (4, 8))
    yield from (replace(base, schemes=base.schemes[:count]) for count in (1, 3))
    yield from (replace(base, samples=samples) for samples in (16, 32))


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face folder with random weights, one shard in memory at a time; how many weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": CACHED_HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    count = 0
    for number, shapes in enumerate([*(_block(layer) for layer in range(layers)), _ends()]):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _drawn(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return count


def _block(layer: int) -> dict[str, tuple[int, ...]]:
    cached = HIDDEN // HEADS * CACHED_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (cached, HIDDEN),
        "self_attn.v_proj": (cached, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _ends() -> dict[str, tuple[int, ...]]:
    wide = (VOCABULARY, HIDDEN)
    return {"model.embed_tokens.weight": wide, "lm_head.weight": wide, "model.norm.weight": (HIDDEN,)}


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def measure(folder: Path, shape: Shape, metric: str, limit: int, threads: int) -> Cost:
    """One worker process with the limit scores every layer; loading and looking at the model count too."""
    data = folder / "tokens.safetensors"
    tokens = torch.randint(0, VOCABULARY, (3 * shape.samples, shape.tokens))
    save_file({"input_ids": tokens}, data)
    spec = SessionSpec(
        ModelSource("folder", str(folder), "random"),
        DataSource(str(data), "safetensors", "random"),
        samples=shape.samples,
        batch_size=1,
        threads=threads,
        memory_limit=limit,
    )
    executor = make_executor("local_pool", ExecutorSettings(1, folder / "logs"))
    executor.start(spec)
    start = time.perf_counter()
    try:
        (inspected,) = _run(executor, [InspectUnit()]).values()
        facts = inspected.facts
        layers = tuple(layer["name"] for layer in facts["inventory"]["layers"])
        plan, scorer = BlockPlan(layers, shape.schemes, shape.samples, spec), SCORERS[metric].load()
        results: dict[str, UnitResult] = {}
        while units := scorer.blocks(plan, {key: result.arrays for key, result in results.items()}):
            results |= _run(executor, units)
    finally:
        executor.close(0)
    return Cost(
        time.perf_counter() - start,
        max(int(result.facts["anonymous_bytes"]) for result in results.values()),
        sum(float(result.facts["forwards"]) for result in results.values()),
        bool(facts["memory"]["streamed"]),
    )


def _run(executor: Executor, units: Sequence[Unit]) -> dict[str, UnitResult]:
    for unit in units:
        executor.submit(unit.key, unit)
    results: dict[str, UnitResult] = {}
    while len(results) < len(units):
        for outcome in executor.wait(1.0):
            if outcome.result is None:
                raise SystemExit(str(outcome.failure))
            results[outcome.key] = outcome.result
    return results


if __name__ == "__main__":
    main()
