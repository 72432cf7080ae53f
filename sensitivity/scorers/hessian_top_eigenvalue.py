"""HAWQ's score: the largest eigenvalue of a layer's Hessian times the squared error of its weights.

|lambda| / P * ||dW||^2 after Dong et al. 2019, arXiv:1905.03696, which orders layers by lambda / P. Power
iteration with the Hessian of the mean loss over the scoring part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator, mean_estimate
from sensitivity.scorers.combining import require_done
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.session import Session

NAME = "hessian_top_eigenvalue"
ITERATIONS = 20
TOLERANCE = 0.01
HVP_FORWARDS = 7
"""Forward, backward, and a backward through the backward."""


class HessianTopEigenvalue:
    """Per layer one block of power iterations (`forms`, v'Hv by micro-batch) and one of weight errors."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        units = [unit for layer in plan.layers for unit in (_power(layer), _errors(plan, layer))]
        return tuple(unit for unit in units if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """The Rayleigh quotient of the last vector on each micro-batch, or squared errors per scheme."""
        return _measure_errors(session, unit) if unit.block.endswith(":errors") else _iterate(session, unit)

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Rows with the standard error over micro-batches."""
        require_done(self.blocks(plan, done))
        rows = []
        for layer in plan.layers:
            arrays = done[_power(layer).key]
            spread = mean_estimate(arrays["forms"])
            signed = float(arrays["eigenvalue"][0])
            value, stderr = abs(signed), spread.stderr if spread.n > 1 else 0.0
            forms = arrays["forms"] * np.sign(signed)
            for scheme, error in zip(plan.schemes, done[_errors(plan, layer).key]["averages"], strict=True):
                rows.append(
                    ScoreRow(layer, scheme, NAME, value * error, stderr * error, spread.n, forms * error)
                )
        return tuple(rows)


def _power(layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:power", (), (layer,))


def _errors(plan: BlockPlan, layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:errors", plan.schemes, (layer,))


def _measure_errors(session: Session, unit: BlockUnit) -> Arrays:
    from sensitivity.contractions import squared_error

    (layer,) = unit.layers
    squares = [squared_error(session.weights, layer, scheme) for scheme in unit.schemes]
    return {"averages": np.array(squares) / session.weights.parameter(layer).numel()}


def _iterate(session: Session, unit: BlockUnit) -> Arrays:
    import torch

    (layer,) = unit.layers
    size = session.weights.parameter(layer).numel()
    start = keyed_generator((session.spec.seed, NAME, layer)).standard_normal(size)
    vector = torch.from_numpy(start / np.linalg.norm(start))
    eigenvalue, forms = 0.0, np.zeros(1)
    for _ in range(ITERATIONS):
        product, forms = _product(session, layer, vector)
        previous, eigenvalue = eigenvalue, float(vector @ product)
        norm = float(product.norm())
        if not np.isfinite(norm):
            raise NonFiniteScore(NAME, layer, "any", "a Hessian product that is not finite")
        if norm == 0 or abs(eigenvalue - previous) <= TOLERANCE * abs(eigenvalue):
            break
        vector = product / norm
    return {"eigenvalue": np.array([eigenvalue]), "forms": forms}


def _product(
    session: Session, layer: str, vector: Tensor
) -> tuple[Tensor, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Hv of the mean loss over the scoring part in float64, and v'Hv of each micro-batch."""
    import torch

    from sensitivity.operators import BlockHessian

    parameter = session.weights.parameter(layer)
    sizes = session.batch_sizes("scoring")
    total, forms = torch.zeros_like(vector), []
    for position, size in enumerate(sizes):
        with session.gradients((layer,)):
            loss, _ = session.differentiable_loss("scoring", position)
            product = BlockHessian(loss, parameter)(vector.to(parameter)[None])[0]
        session.spend(HVP_FORWARDS * size)
        own = product.detach().to("cpu", torch.float64)
        forms.append(float(vector @ own))
        total += own * (size / sum(sizes))
    return total, np.array(forms)
