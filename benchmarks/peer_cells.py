"""One comparison of a peer's plan with ours at equal bytes, and the table of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sensitivity.evidence import Interval, paired_difference

BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
"""Bits per weight as each peer counts them."""


@dataclass(frozen=True)
class Cell:
    """One comparison at equal bytes; KL per sample of the reporting part."""

    peer: str
    model: str
    seed: int
    budget: float
    bytes: int
    bits: float
    theirs: NDArray[np.float64]
    ours: NDArray[np.float64]
    same: bool

    @property
    def ratio(self) -> float:
        """Our mean KL over the peer's."""
        return float(self.ours.mean() / self.theirs.mean())

    @property
    def difference(self) -> Interval:
        """Of peer minus ours: positive throughout is a win."""
        return paired_difference(self.theirs, self.ours)

    @property
    def outcome(self) -> str:
        """win, loss, even, or same for one and the same plan."""
        if self.same:
            return "same"
        if self.difference.low > 0:
            return "win"
        return "loss" if self.difference.high < 0 else "even"


def shown(cell: Cell | None) -> str:
    """`.92` where we win, `.99 =` where the two cannot be told apart, `**1.03**` where we lose."""
    if cell is None:
        return "-"
    ratio = f"{cell.ratio:.2f}".removeprefix("0")
    return {"win": ratio, "loss": f"**{ratio}**", "even": f"{ratio} =", "same": "="}[cell.outcome]


def table(model: str, cells: Sequence[Cell], failed: Mapping[str, str], peers: Sequence[str]) -> list[str]:
    """The lines of one model's table: peers by budgets, in each cell the seeds in order."""
    seeds = sorted({cell.seed for cell in cells})
    found = {(cell.peer, cell.budget, cell.seed): cell for cell in cells if cell.model == model}
    heads = [f"{budget:g} bits" for budget in BUDGETS]
    lines = [
        f"| our KL / peer's, seeds {', '.join(map(str, seeds))} | {' | '.join(heads)} |",
        f"|{'---|' * (len(BUDGETS) + 1)}",
    ]
    for peer in peers:
        if peer in failed:
            lines.append(f"| {peer} | {failed[peer].replace('|', '/')} |{' |' * (len(BUDGETS) - 1)}")
            continue
        row = [", ".join(shown(found.get((peer, budget, seed))) for seed in seeds) for budget in BUDGETS]
        lines.append(f"| {peer} | {' | '.join(row)} |")
    return lines


def counted(cells: Sequence[Cell]) -> str:
    """How many cells were won, lost and neither."""
    count = {name: sum(cell.outcome == name for cell in cells) for name in ("win", "even", "same", "loss")}
    return (
        f"{len(cells)} cells: {count['win']} won, {count['even']} not told apart, {count['same']} the same"
        f" plan, {count['loss']} lost"
    )


def close_ones(cells: Sequence[Cell]) -> list[str]:
    """The cells that are no plain win and not the same plan, with their numbers, losses first."""
    listed = [cell for cell in cells if cell.outcome in ("loss", "even")]
    lines = [
        "| cell | stored bits | peer's KL | our KL | peer less ours, 95 % | |",
        "|---|---|---|---|---|---|",
    ]
    for cell in sorted(listed, key=lambda cell: (cell.outcome != "loss", cell.difference.mean)):
        gap = cell.difference
        lines.append(
            f"| {cell.model} seed {cell.seed}, {cell.peer}, {cell.budget:g} | {cell.bits:.3f} |"
            f" {cell.theirs.mean():.5g} | {cell.ours.mean():.5g} |"
            f" {gap.mean:.2g} [{gap.low:.2g}, {gap.high:.2g}] | {cell.outcome} |"
        )
    return lines
