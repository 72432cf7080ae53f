"""HAWQ-V2's score: average Hessian trace of a layer times the squared error of its weights.

(Tr H / P) ||dW||^2 after Dong et al. 2020, arXiv:1911.03852, without a factor 1/2: about twice the
expected loss. The trace is Hutchinson's estimate with Rademacher probes masked to the layer: z is zero
elsewhere, so z'Hz sees this layer's block alone and has variance 2 (||H||_F^2 - sum h_ii^2). H is the
Hessian of the mean loss over the scoring part; each probe takes one micro-batch, drawn with probability
proportional to its samples, so the standard error covers probes and data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import Estimate, keyed_generator, mean_estimate, rademacher
from sensitivity.scorers.protocol import Done
from sensitivity.spec import SessionSpec
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.session import Session

NAME = "hessian_trace"
BLOCK_PROBES = 16
HVP_FORWARDS = 4
"""A Hessian-vector product on an existing graph in forward passes: a backward through a backward."""


class HessianTrace:
    """Per layer: blocks of probes (`forms`, z'Hz), for all schemes, and one block of weight errors."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """Missing blocks up to the next look; a layer is finished when a look meets the relative error.

        Looks come after 16, 32, 64, ... probes and at the budget, so the stop does not depend on the order
        in which blocks finish.
        """
        missing = [unit for layer in plan.layers for unit in _missing_probes(plan, layer, done)]
        errors = [_error_unit(plan, layer) for layer in plan.layers]
        return (*missing, *(unit for unit in errors if unit.key not in done))

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Quadratic forms of the block's probes, or squared weight errors per scheme."""
        if unit.block.endswith(":errors"):
            return _measure_errors(session, unit)
        return {"forms": _measure_forms(session, unit)}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Rows with stderr = stderr(trace) / P * ||dW||^2; `samples` counts probes."""
        if self.blocks(plan, done):
            raise ValueError("all blocks must be done. Got some missing: ask blocks() again.")
        return tuple(row for layer in plan.layers for row in _rows(plan, layer, done))


# -- planning -------------------------------------------------------------------------------------


def looks(most: int) -> Iterator[int]:
    """Numbers of probes after which the stopping rule is asked.

    >>> list(looks(100))
    [16, 32, 64, 100]
    """
    count = BLOCK_PROBES
    while count < most:
        yield count
        count *= 2
    yield most


def _missing_probes(plan: BlockPlan, layer: str, done: Done) -> list[BlockUnit]:
    for look in looks(plan.settings.max_probes):
        missing = [unit for unit in _probes(plan.settings, layer, look) if unit.key not in done]
        if missing:
            return missing
        if trace_at(plan, layer, done, look).relative_error <= plan.settings.relative_error:
            return []
    return []


def trace_at(plan: BlockPlan, layer: str, done: Done, probes: int) -> Estimate:
    """The trace of a layer's Hessian from its first `probes` probes."""
    units = _probes(plan.settings, layer, probes)
    return mean_estimate(np.concatenate([done[unit.key]["forms"] for unit in units]))


def final_trace(plan: BlockPlan, layer: str, done: Done) -> Estimate:
    """The trace at the first look that meets the relative error, or at the budget."""
    estimates = (trace_at(plan, layer, done, look) for look in looks(plan.settings.max_probes))
    last = next(estimates)
    while last.relative_error > plan.settings.relative_error:
        following = next(estimates, None)
        if following is None:
            break
        last = following
    return last


def _probes(settings: SessionSpec, layer: str, count: int) -> list[BlockUnit]:
    """The blocks of the first `count` probes. The budget cuts the last one, whoever asks."""
    bounds = [(a, min(a + BLOCK_PROBES, settings.max_probes)) for a in range(0, count, BLOCK_PROBES)]
    return [BlockUnit(NAME, f"layer:{layer}:probes:{a}:{b}", (), (layer,)) for a, b in bounds]


def _rows(plan: BlockPlan, layer: str, done: Done) -> Iterator[ScoreRow]:
    trace = final_trace(plan, layer, done)
    arrays = done[_error_unit(plan, layer).key]
    average = arrays["squared_errors"] / arrays["parameters"]
    for scheme, factor in zip(plan.schemes, average.tolist(), strict=True):
        yield ScoreRow(layer, scheme, NAME, trace.value * factor, trace.stderr * factor, trace.n)


def _error_unit(plan: BlockPlan, layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:errors", plan.schemes, (layer,))


# -- measuring ------------------------------------------------------------------------------------


def _measure_errors(session: Session, unit: BlockUnit) -> Arrays:
    (layer,) = unit.layers
    squares = [float(session.weights.error(layer, s).double().square().sum()) for s in unit.schemes]
    return {
        "squared_errors": np.array(squares, dtype=np.float64),
        "parameters": np.array([session.weights.parameter(layer).numel()], dtype=np.float64),
    }


def _measure_forms(session: Session, unit: BlockUnit) -> NDArray[np.float64]:
    (layer,) = unit.layers
    start, stop = (int(number) for number in unit.block.rsplit(":", 2)[1:])
    forms = np.full(stop - start, np.nan)
    for position, probes in _probes_by_batch(session, layer, range(start, stop)).items():
        forms[[probe - start for probe in probes]] = _forms_on(session, layer, position, probes)
    if not np.isfinite(forms).all():
        raise NonFiniteScore(NAME, layer, "any", "a quadratic form that is not finite")
    return forms


def _probes_by_batch(session: Session, layer: str, probes: range) -> dict[int, list[int]]:
    """Which probes meet which micro-batch: a draw per (seed, layer, probe), so graphs are shared."""
    sizes = np.array(session.batch_sizes("scoring"), dtype=np.float64)
    met: dict[int, list[int]] = defaultdict(list)
    for probe in probes:
        generator = keyed_generator((session.spec.seed, layer, probe, "batch"))
        met[int(generator.choice(len(sizes), p=sizes / sizes.sum()))].append(probe)
    return dict(sorted(met.items()))


def _forms_on(session: Session, layer: str, position: int, probes: list[int]) -> NDArray[np.float64]:
    """z'Hz of each probe with the Hessian of one micro-batch's mean loss."""
    import torch

    from sensitivity.estimators import quadratic_forms
    from sensitivity.operators import BlockHessian

    parameter = session.weights.parameter(layer)
    with session.gradients((layer,)):
        loss, size = session.differentiable_loss("scoring", position)
        operator = BlockHessian(loss, parameter)
        keys = [(session.spec.seed, layer, probe) for probe in probes]
        signs = (torch.from_numpy(rademacher(parameter.numel(), key)).to(parameter.device) for key in keys)
        forms = [quadratic_forms(operator, sign[None]) for sign in signs]
    session.spend(size * (3 + HVP_FORWARDS * len(probes)))
    return np.concatenate(forms)
