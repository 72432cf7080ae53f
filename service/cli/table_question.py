"""What `allocate`, `explain` and `frontier` ask of a score table: the options they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quant.patterns import select
from search.budget import parse_limits
from search.catalog import SOLVERS
from search.objectives.catalog import deciding_metric
from search.objectives.objective import Objective
from search.problem import DEFAULT_GAP
from search.question import Question, Restriction, ungrouped
from sensitivity.table_reader import parse_table
from service.cli.options import Forbid, Pins, Ties, assignments, forbidden, names

TableFile = Annotated[
    Path, typer.Argument(metavar="TABLE.json", help='Scores and resources, "bitplan.table/1".')
]
TableLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        help='"bytes<=2 MiB", "latency<=12 ms", "3.5 bpw", "x>=Y", "bytes<=0.25 of range". All hold.',
    ),
]
TableMetric = Annotated[
    str | None, typer.Option("--metric", help="Needed when the table has several metrics.")
]
SolverName = Annotated[str, typer.Option("--solver", help=f"auto, {', '.join(SOLVERS)}.")]
Seconds = Annotated[
    float, typer.Option("--time-limit", help="Seconds; then the best plan known, with its gap.")
]
TargetGap = Annotated[float, typer.Option("--gap", help="Proven relative gap to stop at.")]
DEFAULT_SECONDS = 60.0


@dataclass(frozen=True)
class TableOptions:
    """What is asked of a table, as it was typed."""

    limit: TableLimits = None
    tie: Ties = None
    pin: Pins = None
    forbid: Forbid = None
    metric: TableMetric = None

    def question(self, path: Path, wanted: Objective | None = None) -> Question:
        """The question; layers are named exactly or by pattern, and the metric by the `wanted` objective
        where no other is. Raises TableError, BudgetError, PatternError, ValueError.
        """
        table, groups = ungrouped(parse_table(path.read_bytes()))
        known = table.layer_names
        restrictions = (
            *groups,
            *_pins(self.pin, known),
            *_ties(self.tie, known),
            *_forbidden(self.forbid, known, table.schemes),
        )
        metric = self.metric if wanted is None else deciding_metric(wanted, table.metrics, self.metric)
        return Question(table, metric, parse_limits(self.limit or ()), restrictions)

    def require_none(self, *others: object) -> None:
        """Raise ValueError where limits, ties, pins, forbidden choices or `others` are given beside a
        server's plan or job, which has its own.
        """
        if any((self.limit, self.tie, self.pin, self.forbid, *others)):
            raise ValueError(
                "Limits, ties, pins and forbidden choices must come with a table: a server's plan or job has"
                " its own. Got some. Ask it for another plan first: bitplan plan JOB."
            )


@dataclass(frozen=True)
class SolverOptions(TableOptions):
    """The same, and how the program is solved."""

    solver: SolverName = "auto"
    time_limit: Seconds = DEFAULT_SECONDS
    gap: TargetGap = DEFAULT_GAP


def _pins(pins: list[str] | None, known: tuple[str, ...]) -> Iterator[Restriction]:
    for given, scheme in assignments(pins).items():
        layers = _expanded([given], known)
        yield Restriction("pin", f"{given}={scheme}", pins=dict.fromkeys(layers, scheme))


def _ties(ties: list[str] | None, known: tuple[str, ...]) -> Iterator[Restriction]:
    for members in names(ties):
        yield Restriction("tie", "+".join(members), ties=(tuple(_expanded(members, known)),))


def _forbidden(
    given: list[str] | None, known: tuple[str, ...], schemes: tuple[str, ...]
) -> Iterator[Restriction]:
    for pattern, refused in forbidden(given).items():
        text = f"{pattern}={','.join(refused)}"
        if not set(refused) <= set(schemes):
            raise ValueError(
                f"--forbid must be LAYER=SCHEME with schemes of the table ({', '.join(schemes)}). "
                f"Got {text!r}."
            )
        layers = _expanded([pattern], known)
        yield Restriction("forbid", text, forbidden=dict.fromkeys(layers, tuple(refused)))


def _expanded(given: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """An exact name first, else a pattern."""
    found: dict[str, None] = {}
    for name in given:
        is_pattern = name not in known and ("*" in name or "?" in name)
        found.update(dict.fromkeys(select([name], known) if is_pattern else (name,)))
    return list(found)
