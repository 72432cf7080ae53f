"""Every plan of a small CNN is measured: how near the plans of a search come to the best there is.

The demo's CNN with one block per stage has 10 layers; three schemes each make 59,049 plans. They are measured
here by a walk that shares prefixes, with weights quantized by the library and a forward pass written out below,
on the same samples as the search's own measurements, with which it must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from examples.train_demo_models import train_cnn
from quant.costs import resources
from quant.plan import plan_from_json
from quant.schemes import parse_scheme
from sensitivity.session import Session
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings

MENU = ("w2", "w4", "w8")
BUDGETS = ("2.5", "3", "3.5", "4", "5")
PARTS = ("choosing", "reporting")
SAMPLES = 256
CLOSED = 0.99

Step = tuple[str, Callable[[Any, Tensor], Any]]


@dataclass
class Every:
    """Every plan: columns of the menu (plans, layers), bytes, and KL per part (plans, 2)."""

    layers: list[str]
    choices: NDArray[np.int64]
    bytes: NDArray[np.int64]
    kl: NDArray[np.float64]


def steps_of(model: nn.Module) -> Iterator[Step]:
    """The layers in the order of the forward pass, each as a function of the state and its weight."""
    resnet: Any = model.resnet
    stem = resnet.embedder.embedder
    yield "resnet.embedder.embedder.convolution", lambda x, w: resnet.embedder.pooler(_conv(stem, x, w))
    for s, stage in enumerate(resnet.encoder.stages):
        for b, block in enumerate(stage.layers):
            path = f"resnet.encoder.stages.{s}.layers.{b}"
            if not isinstance(block.shortcut, nn.Identity):
                yield f"{path}.shortcut.convolution", _first(block)
                yield f"{path}.layer.0.convolution", _second(block)
            else:
                yield f"{path}.layer.0.convolution", _only(block)
            yield f"{path}.layer.1.convolution", _last(block)
    head: Any = model.classifier
    yield "classifier.1", lambda x, w: functional.linear(resnet.pooler(x).flatten(1), w, head[1].bias)


def _conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    conv = layer.convolution
    normalized = layer.normalization(functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding))
    activation = getattr(layer, "activation", None)
    return normalized if activation is None else activation(normalized)


def _first(block: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, w: (x, _conv(block.shortcut, x, w))


def _second(block: Any) -> Callable[[Any, Tensor], Any]:
    return lambda pair, w: (_conv(block.layer[0], pair[0], w), pair[1])


def _only(block: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, w: (_conv(block.layer[0], x, w), x)


def _last(block: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda pair, w: block.activation(_conv(block.layer[1], pair[0], w) + pair[1])


@torch.inference_mode()
def every_plan(session: Session) -> Every:
    """Measure all of them."""
    steps = list(steps_of(session.model))
    names = [name for name, _ in steps]
    weights = [[session.weights.quantized(name, scheme) for scheme in MENU] for name in names]
    parts = [
        session.samples.batch(session.samples.parts[part], torch.device("cpu"), torch.float32)
        for part in PARTS
    ]
    images = torch.cat([batch.inputs["pixel_values"] for batch in parts])
    ends = np.cumsum([0] + [batch.size for batch in parts])
    full = session.model(pixel_values=images).logits.double().log_softmax(-1)
    found: list[list[float]] = []

    def walk(depth: int, state: Any) -> None:
        _, step = steps[depth]
        for weight in weights[depth]:
            reached = step(state, weight)
            if depth + 1 < len(steps):
                walk(depth + 1, reached)
                continue
            divergence = (full.exp() * (full - reached.double().log_softmax(-1))).sum(-1)
            found.append([float(divergence[a:b].mean()) for a, b in pairwise(ends)])

    walk(0, images)
    choices = np.indices((len(MENU),) * len(names)).reshape(len(names), -1).T
    by_name = {layer.name: layer for layer in session.inventory.layers}
    used = resources([by_name[name] for name in names], [parse_scheme(s) for s in MENU], None, None)["bytes"]
    sizes = np.array([[int(size) for size in row] for row in used])
    return Every(names, choices, sizes[np.arange(len(names)), choices].sum(axis=1), np.array(found))


def searched(folder: Path, model: Path, data: Path) -> tuple[list[Any], Session]:
    """The plans of a search with default settings, and a session like its workers."""
    url = f"sqlite:///{folder}/data/bitplan.db"
    settings = Settings(data_dir=folder / "data", database_url=url, executor="in_process", workers=1)
    budgets = [f"{bits} bpw" for bits in BUDGETS]
    wanted = {"budgets": budgets, "schemes": list(MENU), "samples": SAMPLES, "include": ["classifier.1"]}
    with Local(settings) as local:
        source, given = folder_source(model), file_data(data)
        asked = local.request(local.model(source), local.calibration(given), wanted)
        job = local.run(asked)
        assert job.state == "succeeded", job.problem
        return local.plans(job.id), Session(spec_of(asked, source, given.source))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plans_close_the_gap_to_the_best_of_all(tmp_path: Path, seed: int) -> None:
    trained = train_cnn(tmp_path, seed, depths=(1, 1, 1))
    plans, session = searched(tmp_path, trained.folder, trained.calibration)
    every = every_plan(session)
    assert len(every.layers) == len(session.inventory.layers) == 10
    assert every.kl.shape == (59049, 2)
    rows = [row_of(every, plan, session.inventory.parameters) for plan in plans]
    print(json.dumps(rows, indent=1))
    assert all(row["closed"]["choosing"] >= CLOSED for row in rows), rows


def row_of(every: Every, plan: Any, parameters: int) -> dict[str, Any]:
    """KL of the best uniform plan, the search's plan and the optimum on each part, and the closed share."""
    limit = float(plan["budget"].removesuffix(" bpw")) * parameters / 8
    fits = every.bytes <= limit
    assignment = plan_from_json(plan["document"]).assignment
    choice = [MENU.index(parse_scheme(assignment[name]).name) for name in every.layers]
    place = int(np.flatnonzero((every.choices == choice).all(axis=1))[0])
    assert fits[place]
    assert every.bytes[place] == plan["resources"]["bytes"]
    measured = [entry["measured"]["mean"] for entry in plan["candidates"] if entry["accepted"]]
    assert every.kl[place, 0] == pytest.approx(measured[-1], rel=1e-3)
    uniform = [int(np.flatnonzero((every.choices == c).all(axis=1))[0]) for c in range(len(MENU))]
    row: dict[str, Any] = {"budget": plan["budget"], "source": plan["source"], "closed": {}}
    best = {"optimum": int(np.where(fits, every.kl[:, 0], np.inf).argmin()), "plan": place}
    best["uniform"] = min((u for u in uniform if fits[u]), key=lambda u: every.kl[u, 0])
    for column, part in enumerate(PARTS):
        values = {name: float(every.kl[index, column]) for name, index in best.items()}
        gap = values["uniform"] - values["optimum"]
        row[part] = values
        row["closed"][part] = (values["uniform"] - values["plan"]) / gap if gap > 0 else 1.0
    return row
