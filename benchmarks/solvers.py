"""The search against plain integer programs in one run: PuLP with CBC, PuLP with HiGHS, and HiGHS itself.

python benchmarks/solvers.py [--sizes 50x4x1,300x8x1,...] [--tables synthetic,ties] [--limit 20]
                            [--rivals 10000] [--gap G] [--sweeps 300x8x1,300x8x2] [--budgets 200]

SIZES are groups x schemes x limits. `synthetic` costs fall with the bits as measured losses do; `ties` are
blocks of equal layers whose costs differ by parts in a billion. Every solver gets the same problem, gap and
`--limit` seconds; the gap is 1e-6, 1e-5 above 10,000 groups, or G. Seconds are of the solve alone: models are
built and handed over before the clock starts, CBC's are its own wall-clock time. The objective is summed anew
from the rounded answer and the limits are checked on integers; `gap` is the solver's own proof. Models of
more than `--rivals` groups are left to our search alone. The sweep solves `--budgets` budgets of one table.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.backends import highspy, pulp
from search.prepared import Prepared
from search.problem import Choice, Problem, Row, relative_gap
from search.solve import solve
from search.solvers.ilp import cbc_bound

SIZES = "50x4x1,300x8x1,300x8x2,1000x12x2,10000x12x2,10000x12x3,100000x12x2,100000x12x3"
MANY = 10_000
COLUMNS = "{:<14} {:<10} {:<10} {:>9} {:>20} {:>9} {:>8}"


@dataclass(frozen=True)
class Run:
    """One solver's answer: its seconds, the rounded choice if any, and the bound it proved."""

    seconds: float
    choice: Choice | None
    bound: float


def main() -> None:
    options = _options()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread")
    print(f"pulp {pulp.__version__}, highspy {highspy.Highs().version()}, {options.limit:g} s each\n")
    print(COLUMNS.format("size", "table", "solver", "seconds", "objective", "gap", "times"))
    for size in options.sizes.split(","):
        for table in options.tables.split(","):
            _compare(size, table, options)
    for size in filter(None, options.sweeps.split(",")):
        _sweep(size, options.budgets)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--tables", default="synthetic,ties")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for each solve")
    parser.add_argument("--rivals", type=int, default=10_000, help="most groups of the plain programs")
    parser.add_argument("--gap", type=float, help="relative gap to prove")
    parser.add_argument("--sweeps", default="300x8x1,300x8x2")
    parser.add_argument("--budgets", type=int, default=200)
    return parser.parse_args()


def _compare(size: str, table: str, options: argparse.Namespace) -> None:
    problem = TABLES[table](*map(int, size.split("x")))
    groups = len(problem.costs)
    gap = options.gap or (1e-5 if groups > MANY else 1e-6)
    own = 0.0
    for name, solver in SOLVERS.items():
        if name != "ours" and groups > options.rivals:
            continue
        run = solver(problem, gap, options.limit)
        own = own or run.seconds
        print(
            COLUMNS.format(size, table, name, *_shown(problem, run), f"{run.seconds / own:.1f}"), flush=True
        )


def _shown(problem: Problem, run: Run) -> tuple[str, str, str]:
    seconds = f"{run.seconds:.3f}"
    if run.choice is None:
        return seconds, "none in time", ""
    if not problem.feasible(run.choice):
        return seconds, "breaks a limit", ""
    objective = problem.objective(run.choice)
    gap = relative_gap(objective, run.bound) if math.isfinite(run.bound) else math.inf
    return seconds, f"{objective:.10g}", f"{gap:.1e}"


def _sweep(size: str, budgets: int) -> None:
    prepared = Prepared(synthetic(*map(int, size.split("x"))))
    ends = [(int(r.usage.min(axis=1).sum()), int(r.usage.max(axis=1).sum())) for r in prepared.problem.rows]
    limits = [
        [int(low + fill * (high - low)) for low, high in ends] for fill in np.linspace(0.02, 0.98, budgets)
    ]
    started, used = time.perf_counter(), time.process_time()
    solutions = [prepared.solve(limit) for limit in limits]
    seconds, used = time.perf_counter() - started, time.process_time() - used
    worst = max(math.inf if solution.gap is None else solution.gap for solution in solutions)
    print(
        f"\nsweep of {budgets} budgets, {size}: {seconds:.3f} s, {used:.3f} of the processor, gap {worst:.0e}"
    )


def synthetic(groups: int, schemes: int, rows: int) -> Problem:
    """Costs that fall fourfold per bit around a layer's own scale, bytes, and other rising resources."""
    random = np.random.default_rng(groups + rows)
    size = random.integers(1_000, 100_000, (groups, 1))
    bits = np.linspace(2, 8, schemes)
    scale = np.abs(random.normal(size=(groups, 1))) * size
    costs = scale * 4.0**-bits * random.uniform(0.5, 1.5, (groups, schemes))
    usages = [(size * bits / 8).astype(np.int64) + random.integers(0, 20, (groups, schemes))]
    usages += [np.sort(random.integers(100, 10_000, (groups, schemes)), axis=1) for _ in range(rows - 1)]
    return _limited(costs, usages)


def ties(groups: int, schemes: int, rows: int) -> Problem:
    """Blocks of eight kinds of layers: equal usage within a kind, costs equal to parts in a billion."""
    random = np.random.default_rng(groups + rows)
    kind = np.arange(groups) % 8
    size = random.integers(1, 40, (8, 1)) * 4096
    bits = np.linspace(2, 8, schemes)
    costs = (size * 4.0**-bits)[kind] * (1 + 1e-9 * random.normal(size=(groups, schemes)))
    usages = [(size * bits / 8).astype(np.int64)[kind]]
    usages += [np.sort(random.integers(10, 1_000, (8, schemes)), axis=1)[kind] for _ in range(rows - 1)]
    return _limited(costs, usages)


def _limited(costs: Any, usages: list[Any]) -> Problem:
    rows = [
        Row(f"r{k}", "<=", usage, int(0.6 * usage.min(axis=1).sum() + 0.4 * usage.max(axis=1).sum()))
        for k, usage in enumerate(usages)
    ]
    return Problem(costs, tuple(rows))


def ours(problem: Problem, gap: float, limit: float) -> Run:
    """The search of this project."""
    started = time.perf_counter()
    solution = solve(problem, gap=gap, time_limit=limit)
    bound = -math.inf if solution.bound is None else solution.bound
    return Run(time.perf_counter() - started, solution.choice, bound)


def pulp_cbc(problem: Problem, gap: float, limit: float) -> Run:
    """The plain program in PuLP, solved by CBC."""
    program = _program(problem)
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        solver = pulp.COIN_CMD(path=bundled, msg=False, gapRel=gap, timeLimit=limit, logPath=str(log))
        solver.tmpDir = folder
        program.solve(solver)
        text = log.read_text()
    took = re.search(r"^Total time .*Wallclock seconds\):.*?([\d.]+)\s*$", text, re.MULTILINE)
    values = [variable.value() or 0.0 for variable in program.variables()]
    found = "No feasible solution" not in text and any(values)
    return Run(
        float(took[1]) if took else math.nan, _choice(problem, values) if found else None, cbc_bound(text)
    )


def pulp_highs(problem: Problem, gap: float, limit: float) -> Run:
    """The plain program in PuLP, solved by HiGHS in this process."""
    program = _program(problem)
    solver = pulp.HiGHS(msg=False, gapRel=gap, timeLimit=limit, threads=1)
    try:
        program.solve(solver)
    except (KeyError, pulp.PulpSolverError):
        return Run(math.nan, None, -math.inf)
    highs = program.solverModel
    info = highs.getInfo()
    values = [variable.value() or 0.0 for variable in program.variables()]
    choice = _choice(problem, values) if info.primal_solution_status == 2 else None
    return Run(highs.getRunTime(), choice, float(info.mip_dual_bound))


def direct_highs(problem: Problem, gap: float, limit: float) -> Run:
    """The same program given to HiGHS as matrices, without PuLP."""
    groups, schemes = problem.costs.shape
    columns = groups * schemes
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, groups + len(problem.rows)
    model.col_cost_ = problem.costs.ravel()
    model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    infinity = highspy.kHighsInf
    limits = [float(row.limit) for row in problem.rows]
    model.row_lower_ = np.array([1.0] * groups + [-infinity] * len(limits))
    model.row_upper_ = np.array([1.0] * groups + limits)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    ends = np.concatenate([np.arange(groups + 1) * schemes, columns * np.arange(2, len(limits) + 2)])
    model.a_matrix_.start_ = ends.astype(np.int32)
    model.a_matrix_.index_ = np.tile(np.arange(columns), len(limits) + 1).astype(np.int32)
    usages = [row.usage.ravel().astype(np.float64) for row in problem.rows]
    model.a_matrix_.value_ = np.concatenate([np.ones(columns), *usages])
    highs = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "mip_rel_gap": gap, "time_limit": limit}
    for name, value in options.items():
        highs.setOptionValue(name, value)
    highs.passModel(model)
    highs.run()
    info = highs.getInfo()
    values = list(highs.getSolution().col_value)
    choice = _choice(problem, values) if info.primal_solution_status == 2 else None
    return Run(highs.getRunTime(), choice, float(info.mip_dual_bound))


def _program(problem: Problem) -> Any:
    """One binary per cell, one equation per group, one row per limit."""
    program = pulp.LpProblem("plain", pulp.LpMinimize)
    groups, schemes = problem.costs.shape
    cells = [
        program.add_variable(f"x{g * schemes + c:09d}", 0, 1, "Integer")
        for g in range(groups)
        for c in range(schemes)
    ]
    program += pulp.LpAffineExpression(zip(cells, problem.costs.ravel().tolist(), strict=True))
    for group in range(groups):
        program += pulp.lpSum(cells[group * schemes : (group + 1) * schemes]) == 1
    for row in problem.rows:
        used = zip(cells, map(float, row.usage.ravel().tolist()), strict=True)
        program += pulp.LpAffineExpression(used) <= float(row.limit)
    return program


def _choice(problem: Problem, values: list[float]) -> Choice:
    """The cell nearest to 1 of every group; variables come in the order of the cells."""
    return tuple(np.array(values).reshape(problem.costs.shape).argmax(axis=1).tolist())


TABLES: dict[str, Callable[[int, int, int], Problem]] = {"synthetic": synthetic, "ties": ties}
SOLVERS: dict[str, Callable[[Problem, float, float], Run]] = {
    "ours": ours,
    "pulp+cbc": pulp_cbc,
    "pulp+highs": pulp_highs,
    "highspy": direct_highs,
}

if __name__ == "__main__":
    main()
