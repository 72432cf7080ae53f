"""Trace estimators side by side on one model in one run: ours, PyHessian's and curvlinops'.

python benchmarks/trace_estimators.py [--environments DIR] [--repeats 10] [--only own,pyhessian,curvlinops]

Trains a small residual network on digits. The question is the trace of each layer's block of the Hessian of
the mean loss over the same 64 samples, whose exact value our operators give column by column. Two tables:

  cost and error   processor seconds of a product over all samples, summed over the layers; root mean square
                   relative error after so many of them. Ours meet micro-batches of 8: eight of those count as
                   one. PyHessian makes one graph for all its products, which its time leaves out; curvlinops
                   makes one for each. `own hutchpp` spends all its products on a micro-batch at once
  agreement        our Hessian metrics against curvlinops' matrices in float64

The peers run in environments of their own, made in DIR (by default in the user's cache) on first use with
torch as constraints.txt pins it: curvlinops pulls torchvision in, which must not come near transformers.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from environments import cache_folder, environment, run_script
from hutchpp import hutchpp
from safetensors.torch import save_file
from torch import nn
from trace_peers import FOLDER, LAYERS, Net, timed

from sensitivity.catalog import SCORERS
from sensitivity.estimators import mean_estimate, rademacher
from sensitivity.operators import BlockHessian
from sensitivity.scorers import hessian_trace
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import Arrays, BlockPlan, BlockUnit

PEERS = {"pyhessian": "pyhessian", "curvlinops": "curvlinops-for-pytorch"}
SAMPLES, BATCH = 64, 8
BUDGETS = (6, 12, 24)
"""Products over all samples."""
SCHEME = "w3"
CHECKED_SAMPLES = 4
EXACT = ("hessian_top_eigenvalue",)
"""Their seeds decide where an iteration starts, and it stops within a tolerance."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = own_session(folder)
        exact = {layer: exact_hessian(session, layer) for layer in LAYERS}
        save_for_peers(session, folder, exact, options.repeats)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f},"
            f" torch {torch.__version__}, one thread, {options.repeats} repetitions\n"
        )
        found = {}
        for peer in options.only.split(","):
            found[peer] = (
                own(session, exact, options.repeats) if peer == "own" else ask(peer, folder, options)
            )
        print_costs(found)
        if "curvlinops" in found:
            print_agreement(session, exact, found["curvlinops"], options.repeats)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--environments", type=Path, default=cache_folder())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", default="own,pyhessian,curvlinops")
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in ("own", *PEERS)]
    if unknown:
        parser.error(f"--only must name some of own, {', '.join(PEERS)}. Got {', '.join(unknown)}.")
    return options


# -- model and data -------------------------------------------------------------------------------


def own_session(folder: Path) -> Session:
    """A session on the trained network; its scoring part is what everybody measures."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None] / 16).float()
    labels = torch.from_numpy(digits.target).long()
    torch.save(trained(images, labels).state_dict(), folder / "model.pt")
    save_file({"x": images[: 3 * SAMPLES], "labels": labels[: 3 * SAMPLES]}, folder / "data.safetensors")
    os.environ[FOLDER] = str(folder)
    source = ModelSource("factory", "trace_peers:build", "trace-benchmark")
    data = DataSource(str(folder / "data.safetensors"), "safetensors", "digits")
    spec = SessionSpec(source, data, task="image_classification", samples=SAMPLES, batch_size=BATCH)
    return Session(replace(spec, include=("*",)))


def trained(images: torch.Tensor, labels: torch.Tensor) -> Net:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(200):
        rows = torch.arange(step * 64, (step + 1) * 64) % len(images)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def exact_hessian(session: Session, layer: str) -> np.ndarray:
    """The layer's block over the scoring part, all columns at once."""
    weight = session.weights.parameter(layer)
    total = np.zeros((weight.numel(), weight.numel()))
    for position, size in enumerate(session.batch_sizes("scoring")):
        with session.gradients((layer,)):
            loss, _ = session.differentiable_loss("scoring", position)
            columns = [
                BlockHessian(loss, weight, vectorized=True)(part).detach()
                for part in torch.eye(weight.numel()).split(256)
            ]
        total += torch.cat(columns).double().numpy() * (size / SAMPLES)
    return total


def save_for_peers(session: Session, folder: Path, exact: dict[str, np.ndarray], repeats: int) -> None:
    rows = session.samples.parts["scoring"]
    labels = session.samples.labels
    assert labels is not None
    arrays = {
        "x": session.samples.tensors["x"][rows].numpy(),
        "labels": labels[rows].numpy(),
        "budgets": np.array(BUDGETS),
        "repeats": np.array(repeats),
    }
    for layer in LAYERS:
        arrays[f"trace.{layer}"] = np.array(np.trace(exact[layer]))
        arrays[f"error.{layer}"] = session.weights.error(layer, SCHEME).numpy()
        arrays[f"probes.{layer}"] = np.stack(
            [
                rademacher(outputs(layer), (session.spec.seed, "activation_hessian_trace", layer, index))
                for index in range(CHECKED_SAMPLES)
            ]
        )
    np.savez(folder / "data.npz", **arrays)


def outputs(layer: str) -> int:
    """Elements of the layer's output for one image of 8 x 8."""
    return {"first": 8 * 64, "second": 12 * 16, "third": 12 * 16, "fourth": 10}[layer]


# -- ours -----------------------------------------------------------------------------------------


def own(session: Session, exact: dict[str, np.ndarray], repeats: int) -> Arrays:
    found: Arrays = {}
    for layer in LAYERS:
        found[f"seconds.{layer}"] = np.array(seconds_per_product(session, layer))
        trace = float(np.trace(exact[layer]))
        for name in ("hutchinson", "xtrace", "hessian_trace", "hutchpp"):
            values = [list(own_traces(session, layer, name, seed)) for seed in range(repeats)]
            found[f"{name}.{layer}"] = np.sqrt(((np.array(values) / trace - 1) ** 2).mean(0))
    return found


def seconds_per_product(session: Session, layer: str) -> float:
    """Of a product over all samples, in turns as long as those whose errors are told."""
    kept, per_product = session.spec, SAMPLES // BATCH
    session.spec = replace(kept, max_probes=BUDGETS[-1] * per_product)
    block = f"layer:{layer}:probes:0:{BUDGETS[0] * per_product}"
    products = BlockUnit("hessian_trace", block, (), (layer,))
    session.run(products)
    seconds = timed(lambda: session.run(products)) / BUDGETS[0]
    session.spec = kept
    return seconds


def own_traces(session: Session, layer: str, name: str, seed: int) -> Iterator[float]:
    """The estimate at each budget, by one estimator for all, or by the pilot's choice."""
    if name == "hutchpp":
        yield from (hutchpp_by_batch(session, layer, budget, seed) for budget in BUDGETS)
        return
    kept, per_product = session.spec, SAMPLES // BATCH
    session.spec = replace(kept, seed=seed, max_probes=BUDGETS[-1] * per_product, relative_error=1e-12)
    plan = BlockPlan((layer,), (), SAMPLES, session.spec)
    forced = {
        "hutchinson": patch.object(hessian_trace, "has_pilot", lambda _: False),
        "xtrace": patch.object(hessian_trace, "chosen", lambda *_: hessian_trace.XTRACE),
        "hessian_trace": nullcontext(),
    }
    with forced[name]:
        scorer, done = SCORERS["hessian_trace"].load(), {}
        while units := scorer.blocks(plan, done):
            done |= {unit.key: session.run(unit).arrays for unit in units}
        size = hessian_trace.turn_size(session.spec, per_product)
        turns = [budget * per_product // size for budget in BUDGETS]
        yield from (hessian_trace.trace_at(plan, layer, done, count).value for count in turns)
    session.spec = kept


def hutchpp_by_batch(session: Session, layer: str, budget: int, seed: int) -> float:
    """Hutch++ on each micro-batch, a third of the products for the range, as its authors advise."""
    weight, total = session.weights.parameter(layer), 0.0
    range_size = max(1, budget // 3)
    for position, size in enumerate(session.batch_sizes("scoring")):
        with session.gradients((layer,)):
            loss, _ = session.differentiable_loss("scoring", position)
            hessian = BlockHessian(loss, weight)
            probes = np.stack(
                [rademacher(weight.numel(), (seed, layer, position, i)) for i in range(budget - range_size)]
            )
            found = hutchpp(
                lambda rows: hessian(torch.from_numpy(np.ascontiguousarray(rows))).detach().numpy(),  # noqa: B023
                probes[:range_size],
                probes[range_size:],
            )
        total += found.value * size / SAMPLES
    return total


# -- peers ----------------------------------------------------------------------------------------


def ask(peer: str, folder: Path, options: argparse.Namespace) -> Arrays:
    python = environment(peer, PEERS[peer], "numpy", folder=options.environments)
    run_script(python, Path(__file__).with_name("trace_peers.py"), peer, folder)
    return dict(np.load(folder / f"{peer}.npz"))


# -- answers --------------------------------------------------------------------------------------


def print_costs(found: dict[str, Arrays]) -> None:
    base = sum(float(found["own"][f"seconds.{layer}"]) for layer in LAYERS) if "own" in found else None
    after = " | ".join(f"error after {budget}" for budget in BUDGETS)
    print(f"| estimator | CPU seconds per product | ratio | {after} | error x sqrt(products) | by layer |")
    print("|" + "---|" * (5 + len(BUDGETS)))
    for who, arrays in found.items():
        seconds = sum(float(arrays[f"seconds.{layer}"]) for layer in LAYERS)
        names = dict.fromkeys(name.split(".")[0] for name in arrays)
        for name in [name for name in names if name not in ("seconds", "check")]:
            errors = np.array([arrays[f"{name}.{layer}"] for layer in LAYERS])
            root = np.sqrt((errors**2).mean(0))
            cells = [f"{who} {name}", f"{seconds:.3f}", "" if base is None else f"{seconds / base:.2f}"]
            cells += [f"{100 * error:.1f} %" for error in root]
            cells += [", ".join(f"{value:.2f}" for value in root * np.sqrt(BUDGETS))]
            print(
                "| " + " | ".join([*cells, ", ".join(f"{100 * error:.1f}" for error in errors[:, -1])]) + " |"
            )
    print()


def print_agreement(session: Session, exact: dict[str, np.ndarray], peer: Arrays, repeats: int) -> None:
    """Random metrics as the mean over seeds, with its standard error: both sides have the same samples."""
    print("| metric | layer | ours | curvlinops | ratio | standard errors apart |")
    print("|---|---|---|---|---|---|")
    for layer in LAYERS:
        error = session.weights.error(layer, SCHEME).double().numpy()
        scale = float((error**2).sum()) / error.size
        tops = float(np.abs(np.linalg.eigvalsh((exact[layer] + exact[layer].T) / 2)).max())
        trace, top = peer[f"check.trace.{layer}"], peer[f"check.top.{layer}"]
        _row("products, trace", layer, float(np.trace(exact[layer])), float(trace), None)
        _row("products, largest eigenvalue", layer, tops, float(top), None)
        expected = {
            "hessian_trace": float(trace) * scale,
            "hessian_top_eigenvalue": float(top) * scale,
            "fisher": float(peer[f"check.fisher.{layer}"]),
            "gram_fisher": float(peer[f"check.fisher.{layer}"]),
            "kronecker": float(peer[f"check.kronecker.{layer}"]),
        }
        for metric, value in expected.items():
            found = mean_estimate([score(session, metric, layer, seed) for seed in range(repeats)])
            _row(metric, layer, found.value, value, None if metric in EXACT else found.stderr)
        unit = BlockUnit("activation_hessian_trace", f"samples:0:{CHECKED_SAMPLES}", (SCHEME,), (layer,))
        ours = session.run(unit).arrays["values"][:, 0, 0]
        theirs = peer[f"check.activation.{layer}"] * changes(session, layer)
        _row("activation_hessian_trace", layer, float(ours.mean()), float(theirs.mean()), None)


def _row(name: str, layer: str, ours: float, theirs: float, stderr: float | None) -> None:
    apart = "" if not stderr else f"{(ours - theirs) / stderr:+.1f}"
    print(f"| {name} | {layer} | {ours:.5g} | {theirs:.5g} | {ours / theirs:.4f} | {apart} |")


def score(session: Session, metric: str, layer: str, seed: int) -> float:
    kept, session.spec = session.spec, replace(session.spec, seed=seed)
    plan = BlockPlan((layer,), (SCHEME,), SAMPLES, session.spec)
    scorer, done = SCORERS[metric].load(), {}
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    session.spec = kept
    return scorer.combine(plan, done)[0].value


def changes(session: Session, layer: str) -> np.ndarray:
    """||y_q - y||^2 of the first samples: the layer's own product with dW and its own inputs."""
    module, kept = session.model.get_submodule(layer), []
    hook = module.register_forward_hook(lambda _m, given, _o: kept.append(given[0]))
    rows = session.samples.parts["scoring"][:CHECKED_SAMPLES]
    with torch.no_grad():
        session.model(session.samples.tensors["x"][rows])
        hook.remove()
        error = session.weights.error(layer, SCHEME).reshape(module.weight.shape)
        without = {"weight": error, "bias": torch.zeros_like(module.bias)}
        change = torch.func.functional_call(module, without, (kept[0],))
    return change.double().square().flatten(1).sum(1).numpy()


if __name__ == "__main__":
    main()
