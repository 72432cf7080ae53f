"""What `allocate`, `explain` and `frontier` ask of a score table: the options they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from quant.patterns import select
from search.budget import parse_limits
from search.objectives.catalog import deciding_metric
from search.objectives.objective import Objective
from search.question import Question, Restriction, ungrouped
from sensitivity.table_reader import parse_table
from service.cli.options import assignments, names

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
Forbidden = Annotated[
    list[str] | None,
    typer.Option("--forbid", help="LAYER=SCHEME[,SCHEME] that a layer, or those of a pattern, must not get."),
]
TableMetric = Annotated[
    str | None, typer.Option("--metric", help="Needed when the table has several metrics.")
]


def table_question(
    path: Path,
    limits: list[str] | None,
    ties: list[str] | None,
    pins: list[str] | None,
    metric: str | None,
    wanted: Objective | None = None,
    forbidden: list[str] | None = None,
) -> Question:
    """The question; layers are named exactly or by pattern, and the metric by the `wanted` objective where no
    other is. Raises TableError, BudgetError, PatternError.
    """
    table, groups = ungrouped(parse_table(path.read_bytes()))
    known = table.layer_names
    restrictions = (
        *groups,
        *_pins(pins, known),
        *_ties(ties, known),
        *_forbidden(forbidden, known, table.schemes),
    )
    metric = metric if wanted is None else deciding_metric(wanted, table.metrics, metric)
    return Question(table, metric, parse_limits(limits or ()), restrictions)


def own_question(*options: object) -> None:
    """Raise ValueError where options are given beside a server's plan or job, which has its own."""
    if any(options):
        raise ValueError(
            "Limits, ties and pins must come with a table: a server's plan or job has its own. Got some. "
            "Ask it for another plan first: bitplan plan JOB."
        )


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
    for text in given or ():
        pattern, separator, named = text.rpartition("=")
        refused = tuple(scheme.strip() for scheme in named.split(","))
        if not separator or not pattern or not set(refused) <= set(schemes):
            raise ValueError(
                f"--forbid must be LAYER=SCHEME with schemes of the table ({', '.join(schemes)}). "
                f"Got {text!r}."
            )
        layers = _expanded([pattern], known)
        yield Restriction("forbid", text, forbidden=dict.fromkeys(layers, refused))


def _expanded(given: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """An exact name first, else a pattern."""
    found: dict[str, None] = {}
    for name in given:
        is_pattern = name not in known and ("*" in name or "?" in name)
        found.update(dict.fromkeys(select([name], known) if is_pattern else (name,)))
    return list(found)
