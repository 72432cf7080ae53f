"""A metric measured only near decisions finds the plans of the full table on a trained language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.digest import folder_digest
from quant.runtimes import default_menu
from quant.schemes import parse_scheme
from search.boundary import near_decision
from search.problem import Choice, Problem, Row
from search.solve import solve
from sensitivity.calibrated import calibrated
from sensitivity.catalog import SCORERS
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockPlan, ScoreUnit

BUDGETS = (2.5, 3.0, 4.0, 5.0)


@pytest.fixture(scope="module")
def session(trained_lm: Any) -> Session:
    model = ModelSource("folder", str(trained_lm.folder), folder_digest(trained_lm.folder)[0])
    data = DataSource(str(trained_lm.calibration), "jsonl", "held out")
    return Session(SessionSpec(model, data, samples=8, sequence_length=64))


@pytest.mark.slow  # scores 168 choices one at a time
def test_plans_of_the_full_table_for_a_fraction_of_the_passes(session: Session) -> None:
    layers, menu = tuple(layer.name for layer in session.inventory.layers), default_menu()
    sizes = np.array(
        [[parse_scheme(s).storage(x.matrix).bytes for s in menu] for x in session.inventory.layers]
    )
    cheap = np.array(_gram_fisher(session, layers, tuple(menu))).reshape(sizes.shape)
    full, passes = np.zeros(sizes.shape), np.zeros(sizes.shape)
    for row, layer in enumerate(layers):
        for column, scheme in enumerate(menu):
            found = session.run(ScoreUnit(layer, scheme, ("output_kl",)))
            full[row, column], passes[row, column] = found.scores[0].value, found.facts["forwards"]
    for budget in BUDGETS:
        limit = int(budget * session.inventory.parameters / 8)
        measured = _refined(cheap, full, sizes, limit)
        chosen = _best(calibrated(cheap, np.where(measured, full, np.nan)).values, sizes, limit)
        assert chosen == _best(full, sizes, limit)
        assert passes[measured].sum() < 0.5 * passes.sum()


def _gram_fisher(session: Session, layers: tuple[str, ...], menu: tuple[str, ...]) -> list[float]:
    scorer, done = SCORERS["gram_fisher"].load(), {}
    plan = BlockPlan(layers, menu, len(session.samples.parts["scoring"]), session.spec)
    while missing := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in missing}
    return [row.value for row in scorer.combine(plan, done)]


def _refined(
    cheap: NDArray[np.float64], full: NDArray[np.float64], sizes: NDArray[np.int64], limit: int
) -> NDArray[np.bool_]:
    """Which cells the cascade measures."""
    measured = np.zeros(sizes.shape, dtype=bool)
    while True:
        found = calibrated(cheap, np.where(measured, full, np.nan))
        choice = _best(found.values, sizes, limit)
        near = near_decision(_problem(found.values, sizes, limit), found.low, found.high, choice)
        if not (near & ~measured).any():
            return measured
        measured |= near


def _problem(values: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> Problem:
    return Problem(values.copy(), (Row("bytes", "<=", sizes.copy(), limit),))


def _best(values: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> Choice:
    choice = solve(_problem(values, sizes, limit)).choice
    assert choice is not None
    return choice
