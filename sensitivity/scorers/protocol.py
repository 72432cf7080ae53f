"""The kinds of scorer. Importing a scorer never loads torch: the runner plans and combines without it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from quant.layers import Layer
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured
    from sensitivity.session import Session

Done = Mapping[str, Mapping[str, NDArray[Any]]]
"""Arrays of finished blocks by the `key` of their unit."""


class ChoiceScorer(Protocol):
    """A metric that is measured for one (layer, scheme) at a time."""

    def score(self, choice: Choice) -> Measured:
        """Measure one choice."""


class BlockScorer(Protocol):
    """A metric that is measured in blocks of samples or probes for many choices at once.

    One that `judges_alone` has blocks whose arrays end in (layers, schemes), of which no cell depends on
    another: blocks of another menu then lend theirs.
    """

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """The blocks that are missing; () when `combine` can be called."""

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Measure one block (in a worker)."""

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """The rows of every (layer, scheme) of the plan. Raises ValueError while blocks are missing."""


class RolesScorer(Protocol):
    """A metric that is made of other metrics' rows."""

    def decide(
        self, layers: Sequence[Layer], offered: Collection[str], chosen: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Layer -> the metric that decides it; `chosen` says so of roles, layers or patterns."""

    def combine(self, rows: Iterable[ScoreRow], decided: Mapping[str, str]) -> tuple[ScoreRow, ...]:
        """The rows of this metric from those of the metrics that decide."""
