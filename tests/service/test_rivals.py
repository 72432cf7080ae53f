"""Rivals of a plan, and what plans are compared by: unit tests on tables, and one search on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from quant.layers import Inventory, Layer
from quant.plan import plan_from_json
from search.refine import Measured
from sensitivity.units import ScoreRow
from service.deciding import Deciding
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, score_table
from service.planning.question import compile_ask
from service.runner.lab import Lab
from service.runner.losses import Losses
from service.runner.rivals import fits, high_ends, random_rivals, uniform_assignments
from service.settings import Settings

MENU = ("w2", "w4", "w8")
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def inputs() -> PlanningInputs:
    layers = [Layer(n, "linear", (8, 32), (8, 32), 256, 256, "other", (), "float32") for n in NAMES]
    found = Inventory(tuple(layers), (), 256 * len(NAMES), 0)
    rows = [ScoreRow(n, s, "output_kl", 4.0 ** -int(s[1]), 0.0, 8) for n in NAMES for s in MENU]
    return PlanningInputs(found, score_table(found, MENU, rows, ["output_kl"]), MENU)


def _ends(inputs: PlanningInputs, ask: Ask) -> dict[str, dict[str, str]]:
    found = high_ends(inputs, ask, compile_ask(inputs, ask))
    return {rival.source: dict(rival.assignment) for rival in found}


def test_the_ends_get_the_most_bits_that_leave_the_rest_something(inputs: PlanningInputs) -> None:
    assert _ends(inputs, Ask("6.5 bpw")) == {
        "ends w8, rest w4": {"a": "w8", "b": "w4", "c": "w4", "d": "w4", "e": "w8"}
    }
    assert list(_ends(inputs, Ask("5 bpw"))) == ["ends w8, rest w2"]
    assert list(_ends(inputs, Ask("4 bpw"))) == ["ends w4, rest w2"]
    assert _ends(inputs, Ask("2.6 bpw")) == {}


def test_ties_pins_and_limits_hold_for_the_ends_too(inputs: PlanningInputs) -> None:
    tied = _ends(inputs, Ask("6.5 bpw", ties=(("a", "b"),)))["ends w8, rest w2"]
    assert tied == {"a": "w8", "b": "w8", "c": "w2", "d": "w2", "e": "w8"}
    pinned = _ends(inputs, Ask("6.5 bpw", pins={"a": "w2", "e": "w2"}))["ends w8, rest w4"]
    assert pinned == {"a": "w2", "b": "w8", "c": "w4", "d": "w8", "e": "w2"}
    assert list(_ends(inputs, Ask("6.5 bpw", limits=("bytes<=800",)))) == ["ends w8, rest w2"]
    assert _ends(inputs, Ask("8.5 bpw", pins=dict.fromkeys(NAMES, "w4"))) == {}


def test_random_rivals_are_different_full_and_the_same_each_time(inputs: PlanningInputs) -> None:
    ask = Ask("4.6 bpw", pins={"c": "w4"})
    compiled = compile_ask(inputs, ask)
    found = [dict(rival.assignment) for rival in random_rivals(compiled)]
    assert len({tuple(plan.values()) for plan in found}) == len(found) == 6
    assert found == [dict(rival.assignment) for rival in random_rivals(compile_ask(inputs, ask))]
    for plan in found:
        assert fits(compiled, plan)
        raised = [plan | {n: up} for n in NAMES for up in MENU[MENU.index(plan[n]) + 1 :]]
        assert not any(fits(compiled, other) for other in raised)


def test_a_pinned_layer_need_not_offer_a_uniform_scheme(inputs: PlanningInputs) -> None:
    refusing = list(inputs.inventory.layers)
    refusing[0] = Layer("a", "linear", (8, 30), (8, 30), 240, 240, "other", (), "float32")
    found = Inventory(tuple(refusing), (), 0, 0)
    menu = ("w2-g32", "w4")
    rows = [ScoreRow(n, s, "output_kl", 0.1, 0.0, 8) for n in NAMES for s in menu]
    table = score_table(found, menu, rows, ["output_kl"])
    narrow = PlanningInputs(found, table, menu)
    assert table.resources_offered()[0].tolist() == [False, True]
    assert list(uniform_assignments(narrow, Ask("9 bpw"))) == ["uniform w4"]
    pinned = uniform_assignments(narrow, Ask("9 bpw", pins={"a": "w4"}))
    assert set(pinned) == {"uniform w2-g32", "uniform w4"}
    assert pinned["uniform w2-g32"]["a"] == "w4"


class FakeLab:
    """Measures what it is told to."""

    def __init__(self, values: list[float]) -> None:
        self._values = np.array(values)

    def quality(self, assignments: Any, part: str, stage: Any) -> Any:
        assert part == "choosing"
        return [(Measured(float(self._values.mean()), 0.1, self._values), {}) for _ in assignments]


VALUES = [1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0]
FIRST = np.arange(8) < 4


@pytest.mark.parametrize(
    ("metric", "contexts", "plans", "mean", "halves"),
    [
        ("output_kl", {}, "weighted", 13.75, (2.5, 25.0)),
        ("output_kl", {"x": FIRST, "y": ~FIRST}, "weighted", 13.75, (2.5, 25.0)),
        ("output_kl", {"x": FIRST, "y": ~FIRST}, "maximum", 19.25, (3.5, 35.0)),
        ("output_kl@x", {"x": FIRST, "y": ~FIRST}, "each", 8.25, (1.5, 15.0)),
        ("output_kl", {"x": np.arange(8) < 3, "y": np.arange(8) >= 3}, "weighted", 11.866667, ()),
    ],
)
def test_halves_are_every_other_sample_of_each_context(
    metric: str, contexts: Any, plans: Any, mean: float, halves: tuple[float, ...]
) -> None:
    deciding = Deciding(("output_kl",), {}, tuple(contexts), plans, {})
    lab = cast("Lab", FakeLab(VALUES))
    [found] = Losses(lab, metric, deciding, contexts)([{}])
    assert found.mean == pytest.approx(mean)
    assert found.halves == pytest.approx(halves)


def test_a_search_measures_the_rivals_and_names_them(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/data/bitplan.db"
    settings = Settings(data_dir=tmp_path / "data", database_url=database, executor="in_process", workers=1)
    wanted = {"budgets": ["6 bpw"], "schemes": ["w2", "w4", "w8"], "samples": 8, "sequence_length": 12}
    model = tiny("llama")
    with Local(settings) as local:
        source, data = local.model(folder_source(model.folder)), local.calibration(file_data(model.data))
        job = local.run(local.request(source, data, {**wanted, "evaluations": 4}))
        assert job.state == "succeeded", job.problem
        [answer] = local.plans(job.id)
    measured = {entry["source"]: entry["measured"]["mean"] for entry in answer["candidates"]}
    assert {
        "additive output_kl",
        "uniform w4",
        "ends w8, rest w4",
        *(f"random {n}" for n in range(1, 7)),
    } <= set(measured)
    entries = {entry["name"]: entry for entry in answer["evidence"]["entries"]}
    assert set(entries) == {
        "plan", "uniform w2", "uniform w4", "uniform w8", "ends w8, rest w4", "best of 6 random"
    }  # fmt: skip
    assert [entry["accepted"] for entry in answer["candidates"]].count(True) >= 1
    accepted = [entry for entry in answer["candidates"] if entry["accepted"]]
    assert answer["source"] == accepted[-1]["source"]
    rivals = [mean for name, mean in measured.items() if name.startswith(("uniform", "ends", "random"))]
    assert accepted[-1]["measured"]["mean"] <= min(*rivals, measured["additive output_kl"])
    assert plan_from_json(answer["document"]).source == answer["source"]
    assert entries["best of 6 random"]["within_limits"]
    assert entries["best of 6 random"]["bytes"] <= 6 * answer["document"]["totals"]["parameters"] / 8
