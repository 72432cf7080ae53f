"""What a person sees: progress bars with time left, tables of plans and their evidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = Mapping[str, Any]
DIGITS = 4
PIPED_WIDTH = 1000
"""Columns where nobody looks: tables keep their own width and no cell is cut."""


def console() -> Console:
    """The console for people: standard output, no highlighting of numbers, tables whole in a pipe."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def print_json(value: object) -> None:
    """Write `value` for machines: JSON with two spaces of indentation, one final newline."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class JobProgress:
    """A bar per stage with the time left, fed with job resources; shown on standard error.

    >>> with JobProgress(quiet=True) as bar:
    ...     bar({"stage": "scoring", "progress": {"done": 3, "total": 10, "eta_seconds": 1.5}})
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, job: Json) -> None:
        """Show where the job stands; a stage that has been left is shown full."""
        stage, progress = job.get("stage"), job.get("progress") or {}
        if stage is None:
            return
        for earlier, task in self._tasks.items():
            if earlier != stage:
                self._fill(task)
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, left="")
        eta, total = progress.get("eta_seconds"), progress.get("total") or None
        left = f"{duration(eta)} left" if eta else ""
        self._progress.update(self._tasks[stage], completed=progress.get("done", 0), total=total, left=left)

    def _fill(self, task: TaskID) -> None:
        total = self._progress.tasks[task].total
        if total is not None:
            self._progress.update(task, completed=total, left="")


def duration(seconds: float) -> str:
    """Seconds for reading.

    >>> duration(75), duration(3.2)
    ('1:15', '3 s')
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes for reading, beside which the exact count stands.

    >>> size(532480)
    '520.0 KiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def plans_table(title: str, plans: Sequence[Json]) -> Group:
    """What was measured on the reporting part: full precision, uniform schemes, the plans; then the verdicts.

    `plans` are plan resources of one job; only those with evidence have rows.
    """
    measured = [plan for plan in plans if plan.get("evidence")]
    evidence = measured[0]["evidence"]
    qualities = sorted(evidence["full_precision"]["quality"])
    table = Table(title=f"{title} ({evidence['samples']} samples, 95 % intervals)", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("bytes", "bits/weight", evidence["measure"], *qualities):
        table.add_column(heading, justify="right", no_wrap=True)
    _add_references(table, evidence, qualities)
    for plan in measured:
        entry = next(row for row in plan["evidence"]["entries"] if row["name"] == "plan")
        table.add_row(*_measured_cells(f"plan {plan['budget']}", entry, qualities), style="bold")
    return Group(table, *(_verdict(plan) for plan in measured))


def _add_references(table: Table, evidence: Json, qualities: Sequence[str]) -> None:
    full = evidence["full_precision"]
    size_cells = (_count(full["bytes"]), _bits(full["bits_per_weight"]))
    table.add_row("full precision", *size_cells, "0", *_qualities(full, qualities))
    uniforms = [entry for entry in evidence["entries"] if entry["name"].startswith("uniform ")]
    for entry in sorted(uniforms, key=lambda row: -int(row["bytes"])):
        table.add_row(*_measured_cells(entry["name"], entry, qualities))


def _verdict(plan: Json) -> str:
    """One line: what the best uniform scheme that fits loses more than the plan, in paired samples."""
    evidence, budget = plan["evidence"], plan["budget"]
    rivals = [entry for entry in evidence["entries"] if entry["within_limits"] and entry["name"] != "plan"]
    if not rivals:
        return f"plan {budget}: no uniform scheme fits"
    nearest = min(rivals, key=lambda entry: float(entry["divergence"]["mean"]))
    answer = (
        "beats every uniform scheme that fits"
        if evidence["verdict"]["beats_all_uniform"]
        else "not shown better"
    )
    difference = interval(nearest["difference"])
    return f"plan {budget}: {answer}; {nearest['name']} is {difference} worse"


def _measured_cells(name: str, entry: Json, qualities: Sequence[str]) -> tuple[str, ...]:
    return (
        name,
        _count(entry["bytes"]),
        _bits(entry["bits_per_weight"]),
        interval(entry["divergence"]),
        *_qualities(entry, qualities),
    )


def _qualities(entry: Json, names: Iterable[str]) -> list[str]:
    return [interval(entry["quality"][name]) for name in names]


def interval(value: Json) -> str:
    """A mean with its interval.

    >>> interval({"mean": 0.0123456, "low": 0.011, "high": 0.0137})
    '0.01235 [0.011, 0.0137]'
    """
    return f"{value['mean']:.{DIGITS}g} [{value['low']:.{DIGITS}g}, {value['high']:.{DIGITS}g}]"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def show_plans(plans: Sequence[Json], *, as_json: bool) -> None:
    """Print plan resources: the evidence where it was measured, else what is predicted and proven."""
    if as_json:
        print_json(list(plans))
        return
    if any(plan.get("evidence") for plan in plans):
        console().print(plans_table("Measured on the reporting part", plans))
    console().print(certificates_table(plans))


def certificates_table(plans: Sequence[Json]) -> Table:
    """What was proven about each budget: status, size, objective, gap, or the least budget."""
    table = Table("budget", "status", "bytes", "bits/weight", "objective", "gap", "found by")
    for plan in plans:
        used = plan.get("resources") or {}
        least = plan.get("least_budget") or {}
        needs = ", ".join(f"{name} {value:g}" for name, value in least.items())
        table.add_row(
            plan["budget"],
            plan["status"],
            _count(used.get("bytes")) or (f"least: {needs}" if needs else ""),
            _bits(used.get("bits_per_weight")),
            _number(plan.get("objective")),
            _number(plan.get("gap")),
            plan.get("source") or plan.get("reason") or "",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
