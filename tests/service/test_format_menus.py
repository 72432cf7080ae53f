"""Menus of all format families in the integer program."""

from __future__ import annotations

import pytest

from quant.layers import Inventory, Layer
from quant.schemes import parse_scheme
from sensitivity.units import ScoreRow
from service.planning.answer import solve_budget
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, score_table

MENU = ("w4", "fp8", "mxfp4", "nvfp4", "nf4", "q2_k", "q4_k", "q6_k", "q8_0", "bf16")
ERRORS = dict(zip(MENU, (9.0, 0.8, 12.0, 7.0, 7.2, 68.0, 4.9, 0.3, 0.02, 0.0), strict=True))


def layer(name: str, rows: int, columns: int) -> Layer:
    shape = (rows, columns)
    return Layer(name, "linear", shape, shape, rows * columns, rows, "other", (), "bfloat16")


@pytest.fixture
def inputs():
    inventory = Inventory((layer("a", 8, 512), layer("b", 8, 96), layer("c", 16, 33)), (), 5392, 0)
    rows = [
        ScoreRow(item.name, name, "output_kl", ERRORS[name] * item.parameters, None, 8)
        for item in inventory.layers
        for name in MENU
        if parse_scheme(name).weight.refuses(item.matrix) is None
    ]
    return PlanningInputs(inventory, score_table(inventory, MENU, rows, ["output_kl"]), MENU)


@pytest.mark.parametrize("budget", ["4.3 bpw", "4.6 bpw", "5.5 bpw", "7 bpw", "12 bpw", "16 bpw"])
def test_plans_keep_the_budget_and_never_take_what_a_layer_refuses(inputs, budget):
    answer = solve_budget(inputs, Ask(budget))
    assert answer.status == "optimal"
    assert answer.plan.totals.bits_per_weight <= float(budget.split()[0])
    for item in inputs.inventory.layers:
        scheme = parse_scheme(answer.plan.assignment[item.name])
        assert scheme.weight.refuses(item.matrix) is None
        assert answer.plan.layers[item.name].bytes == scheme.storage(item.matrix).bytes


def test_the_better_format_of_equal_size_wins(inputs):
    assert solve_budget(inputs, Ask("4.6 bpw")).plan.assignment["a"] == "q4_k"
    assert set(solve_budget(inputs, Ask("16 bpw")).plan.assignment.values()) == {"bf16"}
