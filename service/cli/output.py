"""What a person sees: progress bars with time left, tables of plans and their evidence."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from quant.kv_cache import cache_scheme
from service.cli.plan_files import title_of

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

    Where that is no terminal, a line as each stage begins and for each tenth of it.

    >>> with JobProgress(quiet=True) as bar:
    ...     bar({"stage": "scoring", "progress": {"done": 3, "total": 10, "eta_seconds": 1.5}})
    """

    def __init__(self, *, quiet: bool = False) -> None:
        shown = Console(stderr=True)
        self._lines = not (quiet or shown.is_terminal)
        self._tenths: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=shown,
            disable=quiet or self._lines,
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
        if stage is None or not progress.get("total"):
            return
        if self._lines:
            self._say(stage, progress)
            return
        for earlier, task in self._tasks.items():
            if earlier != stage:
                self._fill(task)
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, left="")
        eta, total = progress.get("eta_seconds"), progress.get("total") or None
        left = f"{duration(eta)} left" if eta else ""
        self._progress.update(self._tasks[stage], completed=progress.get("done", 0), total=total, left=left)

    def _say(self, stage: str, progress: Json) -> None:
        done, total = progress.get("done", 0), progress["total"]
        tenth = 10 * done // total
        if self._tenths.get(stage, -1) < tenth:
            self._tenths[stage] = tenth
            eta = progress.get("eta_seconds")
            left = f", {duration(eta)} left" if eta else ""
            print(f"{stage} {done}/{total}{left}", file=sys.stderr, flush=True)

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
    """What was measured on the reporting part: full precision, uniform schemes, each plan below its other
    rivals; then the verdicts.

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
        entries = plan["evidence"]["entries"]
        for entry in entries[1:]:
            if not _is_uniform(entry):
                name = f"{entry['name']} ({title_of(plan)})"
                table.add_row(*_measured_cells(name, entry, qualities))
        table.add_row(*_measured_cells(f"plan {title_of(plan)}", entries[0], qualities), style="bold")
    return Group(table, *(_verdict(plan) for plan in measured))


def _add_references(table: Table, evidence: Json, qualities: Sequence[str]) -> None:
    full = evidence["full_precision"]
    size_cells = (_count(full["bytes"]), _bits(full["bits_per_weight"]))
    table.add_row("full precision", *size_cells, "0", *_qualities(full, qualities))
    uniforms = [entry for entry in evidence["entries"] if _is_uniform(entry)]
    for entry in sorted(uniforms, key=lambda row: -int(row["bytes"])):
        table.add_row(*_measured_cells(entry["name"], entry, qualities))


def _is_uniform(entry: Json) -> bool:
    return str(entry["name"]).startswith("uniform ")


def _verdict(plan: Json) -> str:
    """One line: what the best uniform scheme that fits loses more than the plan, in paired samples."""
    evidence, budget = plan["evidence"], title_of(plan)
    rivals = [entry for entry in evidence["entries"] if entry["within_limits"] and _is_uniform(entry)]
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


def show_warnings(facts: Json | None) -> None:
    """Print the warnings of a job's summary or a preview on standard error."""
    for warning in (facts or {}).get("warnings") or ():
        Console(stderr=True).print(f"warning: {warning}", markup=False, soft_wrap=True)


def show_plans(plans: Sequence[Json], *, as_json: bool) -> None:
    """Print plan resources: the evidence where it was measured, else what is predicted and proven."""
    if as_json:
        print_json(list(plans))
        return
    if any(plan.get("evidence") for plan in plans):
        console().print(plans_table("Measured on the reporting part", plans))
    console().print(certificates_table(plans))
    for plan in plans:
        if plan.get("pareto"):
            console().print(pareto_table(f"Pareto set at {title_of(plan)}", plan["pareto"]))
        show_conflict(plan.get("conflict"), f" at {title_of(plan)}")
        if plan.get("target"):
            console().print(target_line(plan["target"]), markup=False, soft_wrap=True)


CONFIRMED = {
    "yes": "confirmed",
    "mean": "confirmed by the mean, not by the whole interval",
    "no": "NOT confirmed",
}


def target_line(target: Json) -> str:
    """What a target came to: the measured values of both parts, and how many sizes were tried."""
    tried = f"{len({step['bytes'] for step in target['steps']})} sizes tried"
    if target["choosing"] is None:
        return f"target {target['text']}: not met; {tried}"
    unit = f" {target['unit']}".rstrip()
    parts = (f"{interval(target[part])}{unit} on the {part} part" for part in ("choosing", "reporting"))
    return f"target {target['text']}: {', '.join(parts)}: {CONFIRMED[target['confirmed']]}; {tried}"


def show_work(summary: Json) -> None:
    """What a search took, in forward passes of one sample, beside the estimate before it; and its notes."""
    if summary.get("picked"):
        console().print(f"metric auto: {summary['picked']['why']}", markup=False)
    spent, estimated = summary["forwards"], sum(summary["estimate"]["forwards"].values())
    parts = ", ".join(f"{stage} {count:,.0f}" for stage, count in spent.items())
    total = f"{sum(spent.values()):,.0f} forward passes of one sample"
    by_stage = f" ({parts})" if parts else ""
    console().print(f"work: {total}{by_stage}; estimated {estimated:,.0f}", markup=False)
    for note in summary.get("notes", ()):
        console().print(f"note: {note}", markup=False)


def certificates_table(plans: Sequence[Json]) -> Table:
    """Per budget: what was proved, what each limit costs, its size and schemes, or the least budget."""
    table = Table(
        "budget",
        "program",
        "optimum",
        "gap",
        "price per unit",
        "bytes",
        "bits/weight",
        "plan found by",
        "layers at each scheme",
    )
    for plan in plans:
        used = plan.get("resources") or {}
        least = plan.get("least_budget") or {}
        needs = ", ".join(f"{name} {value:g}" for name, value in least.items())
        table.add_row(
            title_of(plan),
            plan["status"],
            _number(plan.get("objective")),
            _number(plan.get("gap")),
            ", ".join(f"{name} {price:.3g}" for name, price in (plan.get("shadow_prices") or {}).items()),
            _count(used.get("bytes")),
            _bits(used.get("bits_per_weight")),
            plan.get("source") or plan.get("reason") or "",
            _schemes(plan.get("document")) or (f"least budget: {needs}" if needs else ""),
        )
    return table


def pareto_table(title: str, points: Sequence[Json]) -> Table:
    """What a search over several objectives ended with: their values, and how each plan was found."""
    names = [*points[0]["objectives"]]
    table = Table(title=escape(f"{title}, measured on the choosing part"), title_justify="left")
    for name in (*names, "stderr of the loss"):
        table.add_column(escape(name), justify="right")
    table.add_column("plan found by")
    table.add_column("layers at each scheme")
    for point in points:
        values = (_amount_of(point["objectives"][name]) for name in names)
        counts = ", ".join(
            f"{name} x {count}" for name, count in sorted(Counter(point["layers"].values()).items())
        )
        table.add_row(*values, _number(point["measured"]["stderr"]), escape(point["source"]), counts)
    return table


def _amount_of(value: float) -> str:
    """A loss in a few digits, a total of bytes in all of its own.

    >>> _amount_of(0.0123456), _amount_of(123456.0)
    ('0.01235', '123,456')
    """
    return f"{value:,.0f}" if value.is_integer() else _number(value)


def _schemes(document: Json | None) -> str:
    """How many layers got each scheme, the narrowest first, and caches each type: "w2 x 4, w4 x 9, kv-int8 x
    2".
    """
    layers = (document or {}).get("layers", {}).values()
    found = Counter((layer["weight_bits"], layer["scheme"]) for layer in layers)
    caches = Counter(map(cache_scheme, ((document or {}).get("kv_cache") or {}).values()))
    counts = [(scheme, count) for (_, scheme), count in sorted(found.items())] + sorted(caches.items())
    return ", ".join(f"{scheme} x {count}" for scheme, count in counts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def show_conflict(conflict: Json | None, what: str = "") -> None:
    """Print which limits and restrictions cannot hold together, and what giving way at each would buy;
    `what` says where, if that is not plain.
    """
    if not conflict or not conflict["members"]:
        return
    kind = "smallest" if conflict["smallest"] else "irreducible" if conflict["irreducible"] else "known"
    table = Table(
        "",
        "as it is",
        "a plan fits",
        "optimum then",
        title=escape(f"Cannot hold together{what} ({kind} set)"),
        title_justify="left",
    )
    for one in conflict["members"]:
        freed = _amount(one["least"]) if one["kind"] == "limit" else "without it"
        table.add_row(
            escape(f"{one['kind']} {one['name']}"),
            _amount(one.get("limit")),
            {True: freed, False: "not by this alone", None: "not known in time"}[one["fits"]],
            _number(one["objective"]),
        )
    console().print(table)


def show_reference(reference: Json | None) -> None:
    """Print the rate-distortion reference beside what the plan loses on the same layers."""
    if reference is not None:
        console().print(
            f"{reference['name']}: {reference['objective']:.4g} at {reference['bits_per_weight']:.3f} "
            f"bits/weight, the plan {reference['plan']:.4g}",
            markup=False,
        )


def _amount(value: float | None) -> str:
    return "" if value is None else f"{value:,.10g}"
