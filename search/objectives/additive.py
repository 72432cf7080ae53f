"""The sum of the deciding metric: the default."""

from __future__ import annotations

from dataclasses import dataclass

from search.compile import Compiled
from search.objectives.objective import Entry, How, Optimum, without_arguments


@dataclass(frozen=True)
class Sum:
    """The metric, summed over the layers."""

    text: str = "sum"
    metrics: tuple[str, ...] = ()

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is."""
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """What `search.solve.solve` gives."""
        return Optimum(how.solve(compiled.problem))


def _read(arguments: str) -> Sum:
    without_arguments("sum", arguments)
    return Sum()


SUM = Entry("sum", "The deciding metric summed over the layers.", ("sum",), _read)
