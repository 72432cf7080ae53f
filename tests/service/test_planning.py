from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from quant.layers import Inventory, Layer
from quant.lint import RuntimeRefuses, lint
from quant.patterns import PatternError
from quant.runtimes import RUNTIMES
from quant.schemes import SchemeError
from search.compile import CompileError
from sensitivity.units import ScoreRow
from service.planning import (
    Ask,
    PlanningInputs,
    ScoresMissing,
    compile_ask,
    expand_pins,
    expand_ties,
    frontier_of,
    missing_scores,
    score_table,
    solve_budget,
)

MENU = ("w2", "w4", "w8")


def layer(name: str, aliases: tuple[str, ...] = ()) -> Layer:
    return Layer(name, "linear", (8, 32), (8, 32), 256, 256, "other", aliases, "float32")


@pytest.fixture
def inventory():
    return Inventory((layer("a.q"), layer("a.k"), layer("emb", ("lm_head",))), (), 768, 64)


def rows(inventory, schemes=MENU, metric="output_kl"):
    return [
        ScoreRow(item.name, scheme, metric, (n + 1) * 4.0 ** -int(scheme[1]), 0.01, 8)
        for n, item in enumerate(inventory.layers)
        for scheme in schemes
    ]


@pytest.fixture
def inputs(inventory):
    table = score_table(inventory, MENU, rows(inventory), ["output_kl"])
    return PlanningInputs(inventory, table, MENU)


def test_a_table_holds_scores_and_exact_bytes(inputs):
    assert inputs.table.metrics["output_kl"].values[2, 0] == 3 / 16
    assert inputs.table.resources["bytes"][0] == (256 * 2 // 8 + 16, 256 * 4 // 8 + 16, 256 + 16)
    assert inputs.table.layers[0].group is None


def test_scores_of_others_are_passed_over_and_gaps_stay_open(inventory):
    stray = [ScoreRow("z", "w4", "output_kl", 1.0, None, 8), ScoreRow("a.q", "w5", "output_kl", 1.0, None, 8)]
    table = score_table(inventory, MENU, stray, ["output_kl"])
    assert np.isnan(table.metrics["output_kl"].values).all()


def test_a_latency_table_is_a_resource(inventory):
    latency = {item.name: {name: Fraction(1, 3) for name in MENU} for item in inventory.layers}
    table = score_table(inventory, MENU, rows(inventory), ["output_kl"], latency)
    inputs = PlanningInputs(inventory, table, MENU)
    assert solve_budget(inputs, Ask("latency<=1 ns")).status == "optimal"
    assert solve_budget(inputs, Ask("latency_ns<=0.99")).status == "infeasible"


def test_pins_are_expanded_and_names_win_over_patterns(inventory):
    pins = {"a.q": "w8", "a.*": "w2", "lm_head": "w4-channel"}
    assert expand_pins(inventory, pins) == {"a.q": "w8", "a.k": "w2", "emb": "w4"}


@pytest.mark.parametrize(("pins", "error"), [({"zz": "w4"}, PatternError), ({"a.q": "w99"}, SchemeError)])
def test_bad_pins_are_refused(inventory, pins, error):
    with pytest.raises(error, match="Got"):
        expand_pins(inventory, pins)


def test_ties_are_expanded_to_layers(inventory):
    assert expand_ties(inventory, [["a.*"], ["emb", "lm_head"]]) == (("a.q", "a.k"), ("emb",))


def test_a_pinned_layer_needs_only_its_own_score(inventory):
    found = [row for row in rows(inventory) if row.layer != "emb"]
    found.append(ScoreRow("emb", "w6", "output_kl", 0.1, None, 8))
    table = score_table(inventory, (*MENU, "w6"), found, ["output_kl"])
    inputs = PlanningInputs(inventory, table, MENU)
    assert missing_scores(inputs, "output_kl", {"emb": "w6"}) == []
    assert missing_scores(inputs, "output_kl") == [("emb", name) for name in MENU]
    assert solve_budget(inputs, Ask("4.5 bpw", pins={"emb": "w6"})).plan.assignment["emb"] == "w6"
    with pytest.raises(ScoresMissing, match=r"output_kl\. Got none for emb x w2, .*\(3 in all\)"):
        compile_ask(inputs, Ask("4 bpw"))


def test_a_free_layer_never_gets_a_scheme_that_only_a_pin_names(inventory):
    table = score_table(inventory, (*MENU, "w6"), rows(inventory, (*MENU, "w6")), ["output_kl"])
    plan = solve_budget(PlanningInputs(inventory, table, MENU), Ask("8 bpw", pins={"emb": "w6"})).plan
    assert plan.assignment["emb"] == "w6"
    assert set(plan.assignment.values()) <= {"w6", *MENU}
    assert {plan.assignment["a.q"], plan.assignment["a.k"]} <= set(MENU)


def test_the_budget_and_every_limit_hold(inputs):
    answer = solve_budget(inputs, Ask("8 bpw", limits=("bytes<=500",)))
    assert answer.result["resources"]["bytes"] <= 500
    assert answer.plan.budget == "8 bpw,bytes<=500"


def test_equal_questions_give_equal_bytes_and_other_ones_do_not(inputs):
    one, same, other = (
        solve_budget(inputs, ask).plan for ask in (Ask("4 bpw"), Ask("4 bpw"), Ask("4 bpw", gap=0.5))
    )
    assert one.digest == same.digest
    assert one.digests.settings != other.digests.settings


def test_an_unknown_metric_is_refused(inputs):
    with pytest.raises(CompileError, match="fisher"):
        compile_ask(inputs, Ask("4 bpw", metric="fisher"))


def test_the_frontier_keeps_limits_and_leaves_the_budget_out(inputs):
    free = frontier_of(inputs, Ask(""), "bytes", 50)
    assert free[0]["layers"] == {"a.q": "w2", "a.k": "w2", "emb": "w2"}
    limited = frontier_of(inputs, Ask("", limits=("bops<=80000",)), "bytes", 50)
    assert max(point["resources"]["bops"] for point in limited) <= 80000
    assert len(limited) < len(free)


def test_a_runtime_forbids_choices_and_ties_layers(inventory):
    wide = [
        replace(
            item, name=f"m.{name}", weight_shape=(64, 128), matrix=(64, 128), parameters=64 * 128, aliases=()
        )
        for item, name in zip(inventory.layers, ("q_proj", "k_proj", "o_proj"), strict=True)
    ]
    found = Inventory(tuple(wide), (), 3 * 64 * 128, 0)
    inputs = PlanningInputs(found, score_table(found, MENU, rows(found), ["output_kl"]), MENU)
    for budget in ("4.5 bpw", "5.5 bpw", "6.9 bpw", "9 bpw"):
        plan = solve_budget(inputs, Ask(budget, runtime="vllm")).plan
        assert plan.runtime == "vllm"
        assert lint(plan, RUNTIMES["vllm"]) == ()
    assert solve_budget(inputs, Ask("3 bpw", runtime="vllm")).status == "infeasible"
    free = solve_budget(inputs, Ask("3 bpw")).plan
    assert lint(free, RUNTIMES["vllm"])
    assert compile_ask(inputs, Ask("9 bpw", runtime="vllm")).groups == ((0, 1), (2,))


def test_what_a_runtime_forbids_needs_no_score(inventory):
    scored = [row for row in rows(inventory) if row.scheme != "w2"]
    table = score_table(inventory, MENU, scored, ["output_kl"])
    inputs = PlanningInputs(inventory, table, MENU)
    assert len(missing_scores(inputs, "output_kl")) == 3
    assert missing_scores(inputs, "output_kl", runtime="openvino") == []


def test_a_runtime_that_leaves_nothing_is_refused(inputs):
    with pytest.raises(RuntimeRefuses, match=r"a\.q.*output channels must be a multiple of 64"):
        solve_budget(inputs, Ask("9 bpw", runtime="vllm"))
