"""The integer program in PuLP, solved by HiGHS (in process) or CBC.

Only the core that reduced costs left open is modeled, and the objective is the excess over the Lagrangian
bound, so every coefficient is of the size of what is still undecided: a solver's absolute tolerances (1e-6
and worse) then stay far below the target gap. Nothing a solver says is believed without a check: values are
rounded, limits re-checked on integers (a choice that fails is cut off and the model solved again), and the
bound is read from the solver itself, less a margin. PuLP's `LpStatus` says "Optimal" at a time limit and is
not used.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from search.backends import highspy, pulp
from search.core import Core, Lagrangian, least_open
from search.deadline import Deadline
from search.outcome import Outcome
from search.problem import Choice

RANGE = 1e6
MARGIN = 1e-5
MOST_CUTS = 40
WHY = "the bound left choices open"


class BackendMissingError(ValueError):
    """A solver backend that is not installed."""


@dataclass(frozen=True)
class Raw:
    """What a backend said: variable values by name, its own proven bound, whether it proved infeasibility."""

    values: dict[str, float]
    bound: float
    infeasible: bool


Backend = Callable[[Any, Deadline], Raw]
"""Solves a PuLP program until a deadline."""


def solve_ilp_highs(core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline) -> Outcome:
    """Finishes a core with HiGHS."""
    return replace(finish_with(run_highs, core, bound, incumbent, deadline), method="ilp highs", why=WHY)


def solve_ilp_cbc(core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline) -> Outcome:
    """Finishes a core with CBC. Raises BackendMissingError where PuLP finds none."""
    return replace(finish_with(run_cbc, core, bound, incumbent, deadline), method="ilp cbc", why=WHY)


def finish_with(
    backend: Backend, core: Core, bound: Lagrangian, incumbent: Choice | None, deadline: Deadline
) -> Outcome:
    """Solves the integer program of a core; answers that break a limit exactly are cut off, again and
    again."""
    if int(core.open.sum(axis=1).max()) == 1:
        only = core.best([tuple(int(scheme) for scheme in core.open.argmax(axis=1))])
        return Outcome(only, proven=only is not None, infeasible=only is None)
    model = _Model(core, bound, incumbent)
    for cuts in range(MOST_CUTS):
        raw = backend(model.program, deadline)
        note = f"ilp: bound {raw.bound:.9g} of {RANGE:g}, {cuts} cuts"
        if raw.infeasible:
            return Outcome(incumbent, infeasible=incumbent is None, log=(note, "ilp: infeasible"))
        choice, lower = model.choice(raw.values), model.lower(raw.bound)
        if choice is None:
            return Outcome(incumbent, lower, log=(note, "ilp: stopped without an answer"))
        if core.feasible(choice):
            best = core.best([choice] if incumbent is None else [choice, incumbent])
            return Outcome(best, lower, log=(note,))
        if deadline.passed():
            break
        model.forbid(choice)
    return Outcome(incumbent, lower, log=(note, "ilp: its answers break a limit by less than its tolerance"))


class _Model:
    """The open cells as binaries, one slack per row, everything in units of the incumbent's excess."""

    def __init__(self, core: Core, bound: Lagrangian, incumbent: Choice | None) -> None:
        self._bound = bound
        room = int(bound.reduced.max()) if incumbent is None else bound.excess(core, incumbent)
        self._scale = Fraction(max(1, room)) / int(RANGE)
        self._base = [int(scheme) for scheme in core.open.argmax(axis=1)]
        self.program = pulp.LpProblem("core", pulp.LpMinimize)
        free = [int(group) for group in np.flatnonzero(core.open.sum(axis=1) > 1)]
        self._cells = {
            (group, int(scheme)): self.program.add_variable(f"x_{group}_{scheme}", 0, 1, "Integer")
            for group in free
            for scheme in np.flatnonzero(core.open[group])
        }
        self._free = free
        prices = [self._add_row(core, row) for row in range(len(core.usage))]
        excess = [
            (variable, float(Fraction(int(bound.reduced[cell])) / self._scale))
            for cell, variable in self._cells.items()
        ]
        self.program += _weighted([*excess, *prices])
        for group in free:
            members = [(self._cells[group, int(scheme)], 1.0) for scheme in np.flatnonzero(core.open[group])]
            self.program += _weighted(members) == 1

    def choice(self, values: dict[str, float]) -> Choice | None:
        """The cell nearest to 1 of every group; None where the backend gave no values."""
        if any(variable.name not in values for variable in self._cells.values()):
            return None
        chosen = list(self._base)
        best = dict.fromkeys(self._free, -math.inf)
        for (group, scheme), variable in self._cells.items():
            if values[variable.name] > best[group]:
                best[group], chosen[group] = values[variable.name], scheme
        return tuple(chosen)

    def lower(self, bound: float) -> Fraction | None:
        """A backend's bound as a lower bound in cost units, less the margin for its tolerances."""
        if not math.isfinite(bound):
            return None
        excess = Fraction(bound - MARGIN) * self._scale
        return (self._bound.lower + excess) / (1 << self._bound.bits)

    def forbid(self, choice: Choice) -> None:
        """Cuts off one choice."""
        picked = [(self._cells[group, choice[group]], 1.0) for group in self._free]
        self.program += _weighted(picked) <= len(picked) - 1

    def _add_row(self, core: Core, row: int) -> tuple[Any, float]:
        """Adds usage + slack == room in units of the largest usage step; returns the slack with its price."""
        least = least_open(core.usage[row], core.open)
        room = core.limit[row] - int(least.sum())
        above = {cell: int(core.usage[row][cell]) - int(least[cell[0]]) for cell in self._cells}
        step = max(above.values(), default=0) or 1
        slack = self.program.add_variable(f"slack_{row}", 0)
        terms = [(self._cells[cell], used / step) for cell, used in above.items() if used]
        self.program += _weighted([*terms, (slack, 1.0)]) == room / step
        return slack, float(self._bound.multipliers[row] * step / self._scale)


def _weighted(terms: list[tuple[Any, float]]) -> Any:
    """A weighted sum of variables; PuLP 3 and 4 build it alike."""
    return pulp.lpSum([weight * variable for variable, weight in terms])


class _InterruptibleHighs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS in a thread, so that Ctrl-C stops it."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        solver = lp.solverModel
        solver.HandleUserInterrupt = True
        thread = solver.startSolve()
        try:
            while not solver.wait(0.05)[0]:
                pass
        except KeyboardInterrupt:
            solver.cancelSolve()
            thread.join()
            raise


def run_highs(program: Any, deadline: Deadline) -> Raw:
    """HiGHS in this process, through PuLP; status and bound come from HiGHS itself."""
    backend = _InterruptibleHighs(
        msg=False,
        gapRel=0.0,
        gapAbs=1e-7,
        threads=1,
        timeLimit=None if math.isinf(deadline.at) else max(0.01, deadline.left()),
        mip_feasibility_tolerance=1e-9,
        primal_feasibility_tolerance=1e-9,
        dual_feasibility_tolerance=1e-9,
    )
    try:
        program.solve(backend)
    except (KeyError, pulp.PulpSolverError):
        return Raw({}, -math.inf, False)
    solver = program.solverModel
    status = solver.getModelStatus()
    infeasible = status == highspy.HighsModelStatus.kInfeasible
    info = solver.getInfo()
    found = info.primal_solution_status == 2
    values = {variable.name: variable.value() for variable in program.variables()} if found else {}
    return Raw(values, float(info.mip_dual_bound), infeasible)


def run_cbc(program: Any, deadline: Deadline) -> Raw:
    """CBC as PuLP runs it; the bound and infeasibility are read from CBC's own log."""
    with tempfile.TemporaryDirectory(prefix="bitplan-") as folder:
        log = Path(folder) / "cbc.log"
        backend = pulp.COIN_CMD(
            path=cbc_path(),
            msg=False,
            gapRel=0.0,
            gapAbs=1e-9,
            timeLimit=None if math.isinf(deadline.at) else max(1, math.ceil(deadline.left())),
            logPath=str(log),
            options=["primalTolerance 1e-9", "integerTolerance 1e-9", "increment 1e-9"],
        )
        backend.tmpDir = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program.solve(backend)
            except pulp.PulpSolverError:
                return Raw({}, -math.inf, False)
        text = log.read_text(errors="replace") if log.exists() else ""
    infeasible = "proven infeasible" in text or "problem is infeasible" in text.lower()
    values = {variable.name: variable.value() for variable in program.variables()}
    found = not infeasible and all(value is not None for value in values.values())
    return Raw(values if found else {}, cbc_bound(text), infeasible)


def cbc_bound(text: str) -> float:
    """CBC's bound: the "Lower bound" it prints when stopped, else the objective of a search it completed."""
    stopped = re.search(r"^Lower bound:\s+(\S+)", text, re.MULTILINE)
    if stopped:
        return float(stopped[1])
    finished = re.search(r"^Result - Optimal solution found\s+Objective value:\s+(\S+)", text, re.MULTILINE)
    return float(finished[1]) if finished else -math.inf


def cbc_path() -> str | None:
    """The CBC that ships with PuLP 3, or None: PuLP 4 finds its own (`pulp[cbc]`)."""
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    path = bundled if bundled and os.path.exists(bundled) else None
    if path is None and not pulp.COIN_CMD().available():
        raise BackendMissingError(
            "The cbc solver must have a CBC executable. Got none. "
            "Install pulp[cbc] or use the lagrangian solver."
        )
    return path
