"""The other side of benchmarks/trace_estimators.py: runs in the environment of PyHessian or of curvlinops.

python benchmarks/trace_peers.py pyhessian|curvlinops FOLDER

Needs torch and numpy alone beside the peer. FOLDER holds `model.pt` and `data.npz`; `NAME.npz` is written.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from missing_operators import declare_missing_operators
from torch import Tensor, nn

FOLDER = "TRACE_BENCHMARK_FOLDER"
LAYERS = ("first", "second", "third", "fourth")


class Net(nn.Module):
    """A small residual network for digits of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.fourth = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fourth((x + torch.relu(self.third(x))).flatten(1))


def build() -> Net:
    """The trained network of the folder that the environment names."""
    model = Net()
    model.load_state_dict(torch.load(Path(os.environ[FOLDER]) / "model.pt", weights_only=True))
    return model.eval()


def timed(run: Callable[[], object]) -> float:
    """Seconds of the processor: other work on the machine hardly counts."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Peer:
    """What a peer is asked: traces of one layer's block over all samples, other layers held fixed."""

    def __init__(self, folder: Path) -> None:
        os.environ[FOLDER] = str(folder)
        torch.set_num_threads(1)
        data = np.load(folder / "data.npz")
        self.given = {name: torch.from_numpy(data[name]) for name in data.files}
        self.budgets = [int(budget) for budget in data["budgets"]]
        self.repeats = int(data["repeats"])

    def errors(self, layer: str, estimate: Callable[[int], float]) -> list[float]:
        """Root mean square relative error at each budget of products over all samples."""
        exact = float(self.given[f"trace.{layer}"])
        found = []
        for budget in self.budgets:
            values = np.array([estimate(budget) for _ in range(self.repeats)])
            found.append(float(np.sqrt(((values / exact - 1) ** 2).mean())))
        return found


def pyhessian(folder: Path) -> dict[str, np.ndarray]:
    from pyhessian import hessian

    peer, found = Peer(folder), {}
    for layer in LAYERS:
        model = build().requires_grad_(False)
        model.get_submodule(layer).weight.requires_grad_(True)
        data = (peer.given["x"], peer.given["labels"])
        made = hessian(model, nn.CrossEntropyLoss(), data=data, cuda=False)
        probes = max(peer.budgets)
        made.trace(maxIter=2, tol=0)
        found[f"seconds.{layer}"] = timed(lambda: made.trace(maxIter=probes, tol=0)) / probes  # noqa: B023
        found[f"hutchinson.{layer}"] = peer.errors(
            layer,
            lambda budget: float(np.mean(made.trace(maxIter=budget, tol=0))),  # noqa: B023
        )
    return {name: np.asarray(value) for name, value in found.items()}


def curvlinops(folder: Path) -> dict[str, np.ndarray]:
    declare_missing_operators()
    from curvlinops import GGNLinearOperator, HessianLinearOperator, hutchinson_trace, hutchpp_trace, xtrace

    peer, found = Peer(folder), {}
    data = [(peer.given["x"], peer.given["labels"])]
    for layer in LAYERS:
        model = build().requires_grad_(False)
        weight = model.get_submodule(layer).weight.requires_grad_(True)
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), [weight], data, check_deterministic=False
        )
        vector = torch.randn(weight.numel())
        operator @ vector
        found[f"seconds.{layer}"] = timed(lambda: [operator @ vector for _ in range(8)]) / 8  # noqa: B023
        for name, estimate in (
            ("hutchinson", hutchinson_trace),
            ("hutchpp", hutchpp_trace),
            ("xtrace", xtrace),
        ):
            found[f"{name}.{layer}"] = peer.errors(
                layer,
                lambda budget: float(estimate(operator, budget)),  # noqa: B023
            )
        found |= checks(layer, model.double(), weight, peer, HessianLinearOperator, GGNLinearOperator)
    return {name: np.asarray(value) for name, value in found.items()}


def checks(
    layer: str, model: Net, weight: nn.Parameter, peer: Peer, hessian: Callable, ggn: Callable
) -> dict[str, float | np.ndarray]:
    """What our metrics estimate, from the layer's Hessian and Gauss-Newton matrix as curvlinops has them."""
    x, labels = peer.given["x"].double(), peer.given["labels"]
    eye = torch.eye(weight.numel(), dtype=torch.float64)
    arguments = (model, nn.CrossEntropyLoss(), [weight], [(x, labels)])
    full = hessian(*arguments, check_deterministic=False) @ eye
    fisher = ggn(*arguments, check_deterministic=False) @ eye
    error = peer.given[f"error.{layer}"].double()
    return {
        f"check.trace.{layer}": float(full.trace()),
        f"check.top.{layer}": float(torch.linalg.eigvalsh((full + full.mT) / 2).abs().max()),
        f"check.fisher.{layer}": float(error @ fisher @ error) / 2,
        f"check.kronecker.{layer}": kronecker(fisher, error.reshape(len(weight), -1)),
        f"check.activation.{layer}": activation_forms(layer, model, x, labels, peer, hessian),
    }


def kronecker(fisher: Tensor, error: Tensor) -> float:
    """tr(H_O dW H_I dW') after two rounds of power iteration on the dense matrix, rearranged."""
    m, n = error.shape
    rearranged = fisher.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
    outer = torch.eye(m, dtype=fisher.dtype).flatten()
    for _ in range(2):
        inner = rearranged.mT @ outer / outer.square().sum()
        outer = rearranged @ inner / inner.square().sum()
    return float((outer.reshape(m, m) @ error @ inner.reshape(n, n) @ error.mT).trace())


class Shifted(nn.Module):
    """The model with a parameter added to a layer's output."""

    def __init__(self, model: Net, layer: str, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.shift = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hook = self.model.get_submodule(self.layer).register_forward_hook(
            lambda _m, _i, out: out + self.shift
        )
        try:
            return self.model(x)
        finally:
            hook.remove()


def activation_forms(
    layer: str, model: Net, x: Tensor, labels: Tensor, peer: Peer, hessian: Callable
) -> np.ndarray:
    """z'Hz / n of single samples with the Hessian in the layer's output."""
    model.requires_grad_(False)
    forms = []
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out[:1]))
    model(x)
    hook.remove()
    for index, probe in enumerate(peer.given[f"probes.{layer}"].double()):
        shifted = Shifted(model, layer, kept[0].shape)
        data = [(x[index : index + 1], labels[index : index + 1])]
        operator = hessian(shifted, nn.CrossEntropyLoss(), [shifted.shift], data, check_deterministic=False)
        forms.append(float(probe @ (operator @ probe)) / probe.numel())
    return np.array(forms)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    target = Path(sys.argv[2])
    answers = {"pyhessian": pyhessian, "curvlinops": curvlinops}[sys.argv[1]](target)
    np.savez(target / f"{sys.argv[1]}.npz", **answers)
