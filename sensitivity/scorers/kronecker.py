"""YAQA's score: a layer's weight error in a Kronecker model of the divergence's Hessian.

tr(H_O dW H_I dW') with H ~ H_O (x) H_I the Hessian of the divergence from the full-precision model, which is
the Fisher information with labels sampled from the model (Tseng et al. 2025, arXiv:2505.22988), without a
factor 1/2. Power iteration over the gradients G of samples starts at H_O = I and takes half steps in turn,
H_I <- E[G' H_O G] / ||H_O||^2 and H_O <- E[G H_I G'] / ||H_I||^2, each a pass over the scoring part for all
layers. The factors serve every menu of schemes. A side longer than LARGEST_SIDE keeps only the diagonal of
its factor, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import mean_estimate
from sensitivity.scorers.combining import require_done
from sensitivity.scorers.fisher import DRAWS
from sensitivity.scorers.protocol import Done
from sensitivity.scorers.sample_blocks import sampled
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.session import Session

NAME = "kronecker"
HALF_STEPS = 4
BLOCKS = 8
"""The scoring part is cut into so many blocks of samples, at most."""
LARGEST_SIDE = 1024
"""Factors of longer sides are diagonal: a full one of 4,096 takes 64 MiB in each block and half step."""
LARGEST_FACTOR = 2**24
"""So are those of many groups together: numbers in the full factors of all experts of a layer."""
FACTOR_BYTES = 2**28
"""Layers whose factors take more together are measured in passes of their own."""
GIVEN_BYTES = 2**28
"""Layers whose half steps take more together, in all blocks, are scored one lot after the other."""


class Kronecker:
    """Sums over blocks of samples for each half step (`0`, `1`, ... by layer), then scores by layer."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """The shapes, then one part of the layers after the other: what is missing of its first half step
        that is not whole, then its scores. What is given along is one part's.
        """
        if _shapes_unit(plan).key not in done:
            return (_shapes_unit(plan),)
        lots = (_missing(plan, done, part) for part in _parts(plan, done))
        return next((lot for lot in lots if lot), ())

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Shapes of all layers, sums of one half step over a block of samples, or scores of one layer."""
        if unit.block == "shapes":
            return _measure_shapes(session, unit)
        return (
            _measure_step(session, unit) if unit.block.startswith("step:") else _measure_scores(session, unit)
        )

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Rows with the standard error over blocks of samples, which move both factors."""
        require_done(self.blocks(plan, done))
        return tuple(row for layer in plan.layers for row in _rows(plan, layer, done))


# -- planning -------------------------------------------------------------------------------------


def bounds(samples: int) -> list[tuple[int, int]]:
    """The blocks of samples, (first, last + 1).

    >>> bounds(20)
    [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15), (15, 18), (18, 20)]
    """
    size = -(-samples // BLOCKS)
    return [(start, min(start + size, samples)) for start in range(0, samples, size)]


def is_full(groups: int, side: int) -> bool:
    """Whether the factors of a layer's side are matrices, else diagonals.

    The rule is the layer's own: no score depends on which other layers take part.

    >>> is_full(1, 1024), is_full(1, 1025), is_full(128, 1024)
    (True, False, False)
    """
    return side <= LARGEST_SIDE and groups * side**2 <= LARGEST_FACTOR


def _shapes_unit(plan: BlockPlan) -> BlockUnit:
    return BlockUnit(NAME, "shapes", (), plan.layers)


def _step_units(plan: BlockPlan, layers: tuple[str, ...], step: int) -> list[BlockUnit]:
    return [BlockUnit(NAME, f"step:{step}:samples:{a}:{b}", (), layers) for a, b in bounds(plan.samples)]


def _score_unit(plan: BlockPlan, layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:scores", plan.schemes, (layer,))


def _factor_bytes(plan: BlockPlan, done: Done) -> dict[str, tuple[int, int]]:
    """Layer -> bytes of the factor of its inputs and of that of its outputs."""
    shapes = done[_shapes_unit(plan).key]["shapes"].tolist()
    return {
        layer: (_bytes(groups, columns), _bytes(groups, rows))
        for layer, (groups, columns, rows) in zip(plan.layers, shapes, strict=True)
    }


def _bytes(groups: int, side: int) -> int:
    return 4 * groups * side * (side if is_full(groups, side) else 1)


def _cut(sizes: Mapping[str, int], bound: int) -> list[tuple[str, ...]]:
    """Names in order, cut where more would exceed the bound."""
    parts: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not parts or held + size > bound:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return [tuple(part) for part in parts]


def _parts(plan: BlockPlan, done: Done) -> list[tuple[str, ...]]:
    """Layers that share a pass: as many of the plan's, in order, as fit FACTOR_BYTES."""
    return _cut({layer: max(sizes) for layer, sizes in _factor_bytes(plan, done).items()}, FACTOR_BYTES)


def _missing(plan: BlockPlan, done: Done, part: tuple[str, ...]) -> tuple[BlockUnit, ...]:
    """What a part needs next; half steps of which every score is done are not asked for again."""
    left = [layer for layer in part if _score_unit(plan, layer).key not in done]
    for step in range(HALF_STEPS) if left else ():
        units = [unit for unit in _step_units(plan, part, step) if unit.key not in done]
        if units:
            given = _directions(plan, done, part, step)
            return tuple(replace(unit, given=given) for unit in units)
    return _score_units(plan, done, part, left) if left else ()


def _directions(plan: BlockPlan, done: Done, part: tuple[str, ...], step: int) -> dict[str, NDArray[Any]]:
    """The other factor of each layer, over its norm; {} for the first half step, whose is the identity."""
    sums: dict[str, NDArray[Any]] = {}
    for unit in _step_units(plan, part, step - 1) if step else ():
        for name, values in done[unit.key].items():
            sums[name] = sums[name] + values if name in sums else values
    return {name: _direction(total) for name, total in sums.items()}


def _direction(total: NDArray[Any]) -> NDArray[Any]:
    """A sum over its norm, group by group; zeros stay."""
    norms = np.sqrt((total**2).sum(axis=tuple(range(1, total.ndim)), keepdims=True))
    direction: NDArray[Any] = np.divide(total, norms, out=np.zeros_like(total), where=norms > 0)
    return direction


def _score_units(
    plan: BlockPlan, done: Done, part: tuple[str, ...], left: Sequence[str]
) -> tuple[BlockUnit, ...]:
    """Units with each layer's sums in every block of the last two half steps, for as many layers as fit
    GIVEN_BYTES.
    """
    known, blocks = _factor_bytes(plan, done), len(bounds(plan.samples))
    layers = _cut({layer: blocks * sum(known[layer]) for layer in left}, GIVEN_BYTES)[0]
    columns, rows = (_stacked(plan, done, part, layers, HALF_STEPS - back) for back in (2, 1))
    return tuple(
        replace(
            _score_unit(plan, layer),
            given={"columns": columns[layer], "rows": rows[layer], "samples": _sizes(plan)},
        )
        for layer in layers
    )


def _stacked(
    plan: BlockPlan, done: Done, part: tuple[str, ...], layers: Sequence[str], step: int
) -> dict[str, NDArray[Any]]:
    """Layer -> (blocks, ...), its sums in every block of a half step; each block is read once."""
    units, stacks = _step_units(plan, part, step), dict[str, NDArray[Any]]()
    for number, unit in enumerate(units):
        arrays = done[unit.key]
        for layer in layers:
            own = arrays[str(part.index(layer))]
            if layer not in stacks:
                stacks[layer] = np.empty((len(units), *own.shape), own.dtype)
            stacks[layer][number] = own
    return stacks


def _sizes(plan: BlockPlan) -> NDArray[np.float64]:
    return np.array([stop - start for start, stop in bounds(plan.samples)], dtype=np.float64)


def _rows(plan: BlockPlan, layer: str, done: Done) -> list[ScoreRow]:
    arrays = done[_score_unit(plan, layer).key]
    sizes = _sizes(plan)
    rows = []
    for scheme, value, influences in zip(plan.schemes, arrays["values"], arrays["influences"].T, strict=True):
        draws = value + (influences - value) * (sizes / sizes.mean())
        rows.append(
            ScoreRow(layer, scheme, NAME, float(value), mean_estimate(draws).stderr, plan.samples, draws)
        )
    return rows


# -- measuring ------------------------------------------------------------------------------------


def _measure_shapes(session: Session, unit: BlockUnit) -> Arrays:
    """(groups, columns, rows) of each layer, with a note for each side that keeps a diagonal."""
    shapes = [_shape(session, layer) for layer in unit.layers]
    for layer, (groups, rows, columns) in zip(unit.layers, shapes, strict=True):
        for side, what in ((columns, "inputs"), (rows, "outputs")):
            if not is_full(groups, side):
                session.note(
                    layer,
                    f"{NAME} of layer {layer!r} keeps the diagonal of the factor of its {side:,} {what}:"
                    f" a full one is for at most {LARGEST_SIDE:,}, and {LARGEST_FACTOR:,} numbers in all"
                    " groups.",
                )
    return {"shapes": np.array([(groups, columns, rows) for groups, rows, columns in shapes])}


def _shape(session: Session, layer: str) -> tuple[int, int, int]:
    """(groups, rows, columns) of a layer's weight, which is not read."""
    groups, rows, columns = _matrices(session, layer, session.weights.parameter(layer).to("meta")).shape
    return groups, rows, columns


def _matrices(session: Session, layer: str, values: Tensor) -> Tensor:
    """Values of a layer's weight as (groups, rows, columns), in at least float32."""
    import torch

    from quant.ops import to_matrix
    from sensitivity.inputs import groups_of

    found = session.weights.layer(layer)
    matrix = to_matrix(values.detach(), found.op)
    precise = torch.promote_types(torch.float32, values.dtype)
    return matrix.reshape(groups_of(session.model, found), -1, matrix.shape[-1]).to(precise)


def _measure_step(session: Session, unit: BlockUnit) -> Arrays:
    """Sums over the block's samples of G' H_O G (even half steps) or G H_I G', by layer."""
    import torch

    from sensitivity.kronecker import curved
    from sensitivity.passes import GradientPass, Place

    step, start, stop = (int(unit.block.split(":")[place]) for place in (1, 3, 4))
    given = {int(name): torch.tensor(array) for name, array in unit.given.items()}
    sums: dict[int, Tensor] = {}

    def take(place: Place, gradient: Tensor) -> None:
        position = place.position
        matrices = _matrices(session, unit.layers[position], gradient)
        matrices = matrices if step % 2 else matrices.mT
        other = given[position].to(matrices) if position in given else None
        found = curved(matrices, other, full=is_full(*matrices.shape[:2]))
        sums[position] = sums[position] + found if position in sums else found

    samples = range(start, stop)
    session.take_gradients(GradientPass(NAME, unit.layers, (), samples, sampled(session, DRAWS), take))
    return {
        str(position): _array(session, unit, position, step, sums) for position in range(len(unit.layers))
    }


def _array(
    session: Session, unit: BlockUnit, position: int, step: int, sums: Mapping[int, Tensor]
) -> NDArray[Any]:
    """The layer's sum; zeros where no sample reached it."""
    layer = unit.layers[position]
    if position in sums:
        found = sums[position].cpu().numpy()
    else:
        groups, rows, columns = _shape(session, layer)
        side = rows if step % 2 else columns
        found = np.zeros((groups, side, side) if is_full(groups, side) else (groups, side), np.float32)
    if not np.isfinite(found).all():
        raise NonFiniteScore(NAME, layer, "any", "a factor that is not finite")
    return np.asarray(found)


def _measure_scores(session: Session, unit: BlockUnit) -> Arrays:
    """`values` (schemes,), and `influences` (blocks, schemes): see HalfSteps."""
    import torch

    from sensitivity.kronecker import HalfSteps

    (layer,) = unit.layers
    weight = session.weights.parameter(layer)
    sizes = torch.tensor(unit.given["samples"])
    means = [
        sums / sizes.reshape(-1, *[1] * (sums.ndim - 1))
        for sums in (torch.tensor(unit.given[name]).double() for name in ("columns", "rows"))
    ]
    errors = (session.weights.error(layer, scheme).reshape(weight.shape) for scheme in unit.schemes)
    matrices = (_matrices(session, layer, error).double().cpu() for error in errors)
    values, influences = HalfSteps(means[0], means[1], sizes / sizes.sum()).scores(matrices)
    for column in (~torch.isfinite(values)).nonzero()[:1, 0].tolist():
        raise NonFiniteScore(NAME, layer, unit.schemes[column], str(float(values[column])))
    return {"values": values.numpy(), "influences": influences.numpy()}
