"""HAWQ-V2's score: average Hessian trace of a layer times the squared error of its weights.

(Tr H / P) ||dW||^2 after Dong et al. 2020, arXiv:1911.03852, without a factor 1/2: about twice the expected
loss. H is the Hessian of the mean loss over the scoring part, probes are masked to the layer: z is zero
elsewhere, so products see this layer's block alone. A few products at a time meet one micro-batch; the
micro-batches come in a random order, each once before any comes again. A layer's first products serve XTrace
and Hutchinson's estimator (Rademacher probes, variance 2 (||H||_F^2 - sum h_ii^2)) alike, and the one with
the smaller measured variance per product goes on. Layers whose probes XTrace could not hold have
Hutchinson's alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import (
    Estimate,
    Operator,
    Stratum,
    keyed_generator,
    mean_estimate,
    quadratic_forms,
    rademacher,
    stratified,
    xtrace_draws,
    xtrace_estimate,
)
from sensitivity.scorers.combining import require_done
from sensitivity.scorers.protocol import Done
from sensitivity.spec import SessionSpec
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.session import Session

NAME = "hessian_trace"
TURN, LONGEST_TURN = 8, 32
"""Products that meet a micro-batch before the next one; XTrace makes them from half as many probes."""
BLOCK_TURNS = 2
PILOT_TURNS = 4
"""Turns of XTrace before the choice of an estimator; a budget of less than twice as many has no pilot."""
XTRACE_BYTES, XTRACE_COPIES = 2**30, 5
"""XTrace holds its probes, their products and a basis in float64, so many matrices (probes, P) at a time; in
a layer where they take more the pilot's products are plain ones.
"""
GRADIENT_FORWARDS = 3
HVP_FORWARDS = 4
"""A forward and a backward pass, and a backward through the backward, in forward passes."""
HUTCHINSON, XTRACE = "probes", "xtrace"
ARRAYS = ("draws", "forms")
"""XTrace's draws and z'Hz of every probe."""


Floats = NDArray[np.float64]


class HessianTrace:
    """Per layer: blocks of products (`forms`, z'Hz, and XTrace's `draws`), and one block of weight errors."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """Missing blocks up to the next look; a layer is finished when a look meets the relative error.

        Looks come after a number of turns that doubles and at the budget, so the stop does not depend on the
        order in which blocks finish.
        """
        missing = [unit for layer in plan.layers for unit in _missing_products(plan, layer, done)]
        errors = [_error_unit(plan, layer) for layer in plan.layers]
        return (*missing, *(unit for unit in errors if unit.key not in done))

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Quadratic forms of the block's probes, XTrace's draws beside them, or squared weight errors.

        A pilot without draws is that of a layer too large for XTrace: a form for each product.
        """
        if unit.block.endswith(":errors"):
            return _measure_errors(session, unit)
        return _measure_products(session, unit)

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Rows with stderr = stderr(trace) / P * ||dW||^2; `samples` counts draws."""
        require_done(self.blocks(plan, done))
        return tuple(row for layer in plan.layers for row in _rows(plan, layer, done))


# -- planning -------------------------------------------------------------------------------------


def turn_size(settings: SessionSpec, batches: int) -> int:
    """Products per turn: eight, more where the budget meets all micro-batches twice even so, since XTrace
    gains with every product on one matrix; fewer where it is less than two turns.

    >>> from sensitivity.spec import NO_DATA, ModelSource
    >>> spec = SessionSpec(ModelSource("folder", "m", "aa"), NO_DATA, max_probes=256)
    >>> turn_size(spec, batches=64), turn_size(spec, batches=8)
    (8, 16)
    """
    ample = settings.max_probes // (2 * max(batches, PILOT_TURNS))
    return min(max(TURN, min(ample, LONGEST_TURN)), settings.max_probes // 2)


def has_pilot(plan: BlockPlan) -> bool:
    """Whether the budget affords a pilot."""
    return _budget(plan) >= 2 * PILOT_TURNS and _size(plan) >= TURN


def _size(plan: BlockPlan) -> int:
    return turn_size(plan.settings, len(micro_batches(plan)))


def _budget(plan: BlockPlan) -> int:
    return plan.settings.max_probes // _size(plan)


def looks(plan: BlockPlan) -> Iterator[int]:
    """Numbers of turns after which the stopping rule is asked: doubling, and at the budget."""
    most = _budget(plan)
    count = PILOT_TURNS if has_pilot(plan) else BLOCK_TURNS
    while count < most:
        yield count
        count *= 2
    yield most


def batch_of(turn: int, layer: str, count: int, seed: int) -> int:
    """The micro-batch that a turn of a layer meets: a random order of all `count`, again and again."""
    return int(keyed_generator((seed, layer, "order")).permutation(count)[turn % count])


def _missing_products(plan: BlockPlan, layer: str, done: Done) -> list[BlockUnit]:
    for turns in looks(plan):
        missing = [unit for unit in _units(plan, layer, done, turns) if unit.key not in done]
        if missing:
            return missing
        if trace_at(plan, layer, done, turns).relative_error <= plan.settings.relative_error:
            return []
    return []


def _units(plan: BlockPlan, layer: str, done: Done, turns: int) -> list[BlockUnit]:
    """The blocks of the first turns: the pilot's, then those of the estimator that it chose."""
    pilot = _pilot(plan, layer)
    if turns == PILOT_TURNS and pilot:
        return pilot
    first = PILOT_TURNS if pilot else 0
    return [*pilot, *_blocks(chosen(plan, layer, done), layer, range(first, turns), plan)]


def _pilot(plan: BlockPlan, layer: str) -> list[BlockUnit]:
    turns = range(PILOT_TURNS if has_pilot(plan) else 0)
    return _blocks(XTRACE, layer, turns, plan)


def _blocks(kind: str, layer: str, turns: range, plan: BlockPlan) -> list[BlockUnit]:
    size = _size(plan)
    bounds = [(a * size, min(a + BLOCK_TURNS, turns.stop) * size) for a in turns[::BLOCK_TURNS]]
    return [BlockUnit(NAME, f"layer:{layer}:{kind}:{a}:{b}", (), (layer,)) for a, b in bounds]


def chosen(plan: BlockPlan, layer: str, done: Done) -> str:
    """The estimator of a layer: that with the smaller variance per product in the pilot, if there is one and
    the layer had room for XTrace.
    """
    pilot = _pilot(plan, layer)
    if not pilot or any(ARRAYS[0] not in done[unit.key] for unit in pilot):
        return HUTCHINSON
    draws, forms = (np.concatenate([_turns(plan, unit, done, name) for unit in pilot]) for name in ARRAYS)
    by_xtrace = _size(plan) * np.mean([xtrace_estimate(row).stderr ** 2 for row in draws])
    return XTRACE if by_xtrace < forms.var(axis=1, ddof=1).mean() else HUTCHINSON


def trace_at(plan: BlockPlan, layer: str, done: Done, turns: int) -> Estimate:
    """The trace of a layer's Hessian from its first turns; `n` counts draws."""
    kind, sizes, met = chosen(plan, layer, done), micro_batches(plan), _met(plan, layer, done, turns)
    draws = [row for rows in met.values() for row in rows]
    count = sum(map(len, draws))
    strata = [_stratum(kind, sizes[batch], rows) for batch, rows in met.items()]
    estimate = stratified(strata, len(sizes), count)
    if math.isfinite(estimate.stderr):
        return estimate
    return Estimate(estimate.value, mean_estimate([row.mean() for row in draws]).stderr, count)


def _met(plan: BlockPlan, layer: str, done: Done, turns: int) -> dict[int, list[Floats]]:
    """The draws of the layer's estimator in its first turns, by micro-batch."""
    name = ARRAYS[0] if chosen(plan, layer, done) == XTRACE else ARRAYS[1]
    count = len(micro_batches(plan))
    rows = [row for unit in _units(plan, layer, done, turns) for row in _turns(plan, unit, done, name)]
    met: dict[int, list[Floats]] = defaultdict(list)
    for turn, row in enumerate(rows):
        met[batch_of(turn, layer, count, plan.settings.seed)].append(row)
    return dict(sorted(met.items()))


def _draws(plan: BlockPlan, trace: Estimate, met: dict[int, list[Floats]]) -> Floats:
    """Values (n,) with the trace as their mean and its standard error: each draw's distance from the mean of
    its micro-batch, by that one's weight; from the mean of all where a micro-batch has a single draw.
    """
    sizes, found = micro_batches(plan), {batch: np.concatenate(rows) for batch, rows in met.items()}
    total = sum(sizes[batch] for batch in found)
    parts = [(own - own.mean()) * (sizes[b] / total * trace.n / len(own)) for b, own in found.items()]
    moves = np.concatenate(parts)
    if any(len(own) == 1 for own in found.values()):
        moves = np.concatenate(list(found.values()))
        moves = moves - moves.mean()
    spread = mean_estimate(moves).stderr
    return trace.value + moves * (trace.stderr / spread if spread else 0.0)


def micro_batches(plan: BlockPlan) -> list[int]:
    """Samples in each micro-batch of the scoring part."""
    size = plan.settings.batch_size
    return [min(size, plan.samples - start) for start in range(0, plan.samples, size)]


def _stratum(kind: str, weight: int, rows: list[Floats]) -> Stratum:
    """A micro-batch's trace; single probes on it tell no variance."""
    if kind == XTRACE:
        turns = [xtrace_estimate(row) for row in rows]
        variance = float(np.mean([turn.stderr**2 for turn in turns])) / len(turns)
        return Stratum(weight, float(np.mean([turn.value for turn in turns])), variance)
    found = mean_estimate(np.concatenate(rows))
    return Stratum(weight, found.value, found.stderr**2)


def _turns(plan: BlockPlan, unit: BlockUnit, done: Done, name: str) -> Floats:
    """An array of a block as (turns, ...)."""
    start, stop = _bounds(unit)
    array: Floats = done[unit.key][name].reshape((stop - start) // _size(plan), -1)
    return array


def _bounds(unit: BlockUnit) -> tuple[int, int]:
    start, stop = unit.block.rsplit(":", 2)[1:]
    return int(start), int(stop)


def _last_look(plan: BlockPlan, layer: str, done: Done) -> int:
    """The first look whose trace meets the relative error, or that at the budget."""
    for turns in looks(plan):
        last = turns
        if trace_at(plan, layer, done, turns).relative_error <= plan.settings.relative_error:
            break
    return last


def _rows(plan: BlockPlan, layer: str, done: Done) -> Iterator[ScoreRow]:
    turns = _last_look(plan, layer, done)
    trace = trace_at(plan, layer, done, turns)
    draws = _draws(plan, trace, _met(plan, layer, done, turns))
    arrays = done[_error_unit(plan, layer).key]
    average = arrays["squared_errors"] / arrays["parameters"]
    for scheme, factor in zip(plan.schemes, average.tolist(), strict=True):
        value, stderr = trace.value * factor, trace.stderr * factor
        yield ScoreRow(layer, scheme, NAME, value, stderr, trace.n, draws * factor)


def _error_unit(plan: BlockPlan, layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:errors", plan.schemes, (layer,))


# -- measuring ------------------------------------------------------------------------------------


def _measure_errors(session: Session, unit: BlockUnit) -> Arrays:
    from sensitivity.contractions import squared_error

    (layer,) = unit.layers
    squares = [squared_error(session.weights, layer, scheme) for scheme in unit.schemes]
    return {
        "squared_errors": np.array(squares, dtype=np.float64),
        "parameters": np.array([session.weights.parameter(layer).numel()], dtype=np.float64),
    }


def _measure_products(session: Session, unit: BlockUnit) -> Arrays:
    """Turn by turn; every probe is a function of (seed, layer, number of its product)."""
    (layer,), (start, stop) = unit.layers, _bounds(unit)
    size = turn_size(session.spec, len(session.batch_sizes("scoring")))
    by_xtrace = f":{XTRACE}:" in unit.block and xtrace_fits(size, session.weights.parameter(layer).numel())
    found: dict[str, list[Floats]] = defaultdict(list)
    for turn in range(start // size, -(-stop // size)):
        numbers = range(max(start, turn * size), min(stop, (turn + 1) * size))
        with _products_on(session, layer, turn, len(numbers)) as operator:
            if by_xtrace:
                draws, forms = xtrace_draws(operator, _probes(session, layer, numbers[: size // 2]))
                found[ARRAYS[0]].append(draws)
                found[ARRAYS[1]].append(forms)
            else:
                for number in numbers:
                    found[ARRAYS[1]].append(quadratic_forms(operator, _probes(session, layer, [number])))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def xtrace_fits(size: int, parameters: int) -> bool:
    """Whether there is room for XTrace's matrices for a turn of `size` products in a layer.

    >>> xtrace_fits(8, 2048 * 2048), xtrace_fits(8, 4096 * 4096), xtrace_fits(32, 2048 * 2048)
    (True, False, False)
    """
    return XTRACE_COPIES * 8 * (size // 2) * parameters <= XTRACE_BYTES


def _probes(session: Session, layer: str, numbers: Sequence[int]) -> Floats:
    size = session.weights.parameter(layer).numel()
    return np.stack([rademacher(size, (session.spec.seed, layer, number)) for number in numbers])


@contextmanager
def _products_on(session: Session, layer: str, turn: int, count: int) -> Iterator[Operator]:
    """The Hessian of the mean loss of the turn's micro-batch, for `count` products."""
    import torch

    from sensitivity.operators import BlockHessian

    parameter = session.weights.parameter(layer)
    position = batch_of(turn, layer, len(session.batch_sizes("scoring")), session.spec.seed)
    with session.gradients((layer,)):
        loss, size = session.differentiable_loss("scoring", position)
        hessian = BlockHessian(loss, parameter)

        def products(rows: Floats) -> Floats:
            found = hessian(torch.from_numpy(np.ascontiguousarray(rows)).to(parameter.device))
            array: Floats = found.detach().cpu().numpy()
            if not np.isfinite(array).all():
                raise NonFiniteScore(NAME, layer, "any", "a Hessian product that is not finite")
            return array

        yield products
    session.spend(size * (GRADIENT_FORWARDS + HVP_FORWARDS * count))
