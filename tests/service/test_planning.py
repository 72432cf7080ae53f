from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from quant.geometry import Geometry
from quant.kv_cache import Caches
from quant.layers import Inventory, Layer
from quant.lint import RuntimeRefuses, lint
from quant.patterns import PatternError
from quant.runtimes import RUNTIMES
from quant.schemes import SchemeError, parse_schemes
from search.compile import CompileError, compile_problem
from search.explain import explain
from search.solve import solve
from sensitivity.table import MetricTable
from sensitivity.units import ScoreRow
from service.costing import cost_request, costs_of
from service.planning.answer import frontier_of, solve_budget
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, ScoresMissing, planning_menu, score_table
from service.planning.question import compile_ask, question_of
from service.planning.selection import expand_pins, expand_ties, forbidden_in, missing_scores
from service.runner.rivals import uniform_assignments

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


def gaps(inputs, ask):
    return missing_scores(inputs, ask, np.isnan(inputs.table.metrics["output_kl"].values))


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
    assert gaps(inputs, Ask("", pins={"emb": "w6"})) == []
    assert gaps(inputs, Ask("")) == [("emb", name) for name in MENU]
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
    free = frontier_of(inputs, Ask(""), "bytes", 50)["items"]
    assert free[0]["layers"] == {"a.q": "w2", "a.k": "w2", "emb": "w2"}
    limited = frontier_of(inputs, Ask("", limits=("bops<=80000",)), "bytes", 50)["items"]
    assert max(point["resources"]["bops"] for point in limited) <= 80000
    assert len(limited) < len(free)


def wide_inputs(inventory):
    wide = [
        replace(
            item, name=f"m.{name}", weight_shape=(64, 128), matrix=(64, 128), parameters=64 * 128, aliases=()
        )
        for item, name in zip(inventory.layers, ("q_proj", "k_proj", "o_proj"), strict=True)
    ]
    found = Inventory(tuple(wide), (), 3 * 64 * 128, 0)
    return PlanningInputs(found, score_table(found, MENU, rows(found), ["output_kl"]), MENU)


def test_a_runtime_forbids_choices_and_ties_layers(inventory):
    inputs = wide_inputs(inventory)
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
    assert len(gaps(inputs, Ask(""))) == 3
    assert gaps(inputs, Ask("", runtime="openvino")) == []


def test_forbidden_choices_are_neither_made_nor_asked_for(inventory, inputs):
    ask = Ask("9 bpw", forbid={"a.*": ("w8", "w2"), "lm_head": ("w8-channel",)})
    answer = solve_budget(inputs, ask)
    assert answer.plan.assignment == {"a.q": "w4", "a.k": "w4", "emb": "w4"}
    named = [(one.kind, one.name) for one in question_of(inputs, ask, ()).restrictions]
    assert named == [("forbid", "a.*=w8,w2"), ("forbid", "lm_head=w8-channel")]
    assert answer.result["ask"]["forbid"] == {"a.*": ["w8", "w2"], "lm_head": ["w8-channel"]}
    assert Ask.of(answer.result["ask"], "9 bpw", "output_kl") == replace(ask, metric="output_kl")
    assert ask.settings_digest(MENU) != Ask("9 bpw").settings_digest(MENU)
    assert solve_budget(inputs, replace(ask, protect=("a.q",))).plan.assignment["a.q"] == "w4"
    table = score_table(
        inventory, MENU, [row for row in rows(inventory) if row.scheme == "w4"], ["output_kl"]
    )
    scored = PlanningInputs(inventory, table, MENU)
    assert gaps(scored, replace(ask, forbid={"*": ("w2", "w8")})) == []
    assert gaps(scored, ask) == [("emb", "w2")]


def test_everything_forbidden_is_infeasible_and_says_so(inputs):
    answer = solve_budget(inputs, Ask("9 bpw", forbid={"emb": MENU}))
    assert answer.status == "infeasible"
    assert [(one["kind"], one["name"]) for one in answer.result["conflict"]["members"]] == [
        ("forbid", "emb=w2,w4,w8")
    ]


def test_forbids_are_rules_of_rivals_and_runtimes_too(inventory, inputs):
    assert [*uniform_assignments(inputs, Ask("9 bpw", forbid={"a.q": ("w4",)}))] == [
        "uniform w2",
        "uniform w8",
    ]
    wide = wide_inputs(inventory)
    alone = forbidden_in(wide.inventory, MENU, "vllm")
    both = forbidden_in(wide.inventory, MENU, "vllm", forbid={"m.q_proj": ("w8",)})
    assert both == {**alone, "m.q_proj": (*alone["m.q_proj"], "w8")}


@pytest.mark.parametrize(
    ("forbid", "kind", "words"),
    [
        ({"zzz": ("w2",)}, PatternError, "zzz"),
        ({"a.q": ("w3",)}, CompileError, "must be one of the menu: w2, w4, w8. Got 'w3' for 'a.q'"),
        ({"a.q": ("kv-int8",)}, PatternError, "for a search that decides caches"),
        ({"a.q": ("many bits",)}, SchemeError, "many bits"),
    ],
)
def test_what_cannot_be_forbidden(inputs, forbid, kind, words):
    with pytest.raises(kind, match=words):
        solve_budget(inputs, Ask("9 bpw", forbid=forbid))


def test_a_pin_to_what_is_forbidden_is_refused(inputs):
    with pytest.raises(CompileError, match="w8"):
        solve_budget(inputs, Ask("9 bpw", pins={"a.q": "w8"}, forbid={"a.*": ("w8",)}))


def test_a_runtime_that_leaves_nothing_is_refused(inputs):
    with pytest.raises(RuntimeRefuses, match=r"a\.q.*output channels must be a multiple of 64"):
        solve_budget(inputs, Ask("9 bpw", runtime="vllm"))


GEOMETRY = Geometry(cached=32, windows=(None, 48), vectors=4, attention=("a", "b"))
CACHE_LOSSES = {"kv-full": 0.0, "kv-fp8_e4m3": 0.03, "kv-int8": 0.01, "kv-int4": 0.2}
COSTS = {"deployment": {"context_length": 100, "batch": 2}}


@pytest.fixture
def joint(inventory):
    """Weights and the caches of two attention layers in one table."""
    caches = Caches.of(["fp8", "int8", "int4"], GEOMETRY)
    found = rows(inventory) + [
        ScoreRow(name, scheme, "output_kl", (1 + place) * loss, 0.01, 8)
        for place, name in enumerate(caches.layers)
        for scheme, loss in CACHE_LOSSES.items()
    ]
    costs = costs_of(cost_request(COSTS), inventory, parse_schemes(MENU), GEOMETRY, None, caches)
    table = score_table(inventory, MENU, found, ["output_kl"], costs=costs, caches=caches)
    return PlanningInputs(inventory, table, planning_menu(MENU, caches), caches=caches)


def cache_bytes(layer, scheme):
    """Two key and two value vectors of 8 values for each token; a window of 48 tokens in the second layer."""
    bits = {"kv-full": 16, "kv-fp8_e4m3": 8, "kv-int8": 8, "kv-int4": 4}[scheme]
    scales = 16 * 4 if "int" in scheme else 0
    return 2 * (100 if layer == "a" else 48) * (32 * bits + scales) // 8


def best(inventory, memory, cache=10**9):
    """Every plan there is, weights times caches, by the definitions."""
    losses = {(row.layer, row.scheme): row.value for row in rows(inventory)}
    names = [item.name for item in inventory.layers]
    found = []
    for weights in product(MENU, repeat=len(names)):
        for caches in product(CACHE_LOSSES, repeat=2):
            stored = sum(256 * int(scheme[1:]) // 8 + 16 for scheme in weights) + inventory.other_bytes
            kept = cache_bytes("a", caches[0]) + cache_bytes("b", caches[1])
            loss = sum(losses[pair] for pair in zip(names, weights, strict=True))
            loss += CACHE_LOSSES[caches[0]] + 2 * CACHE_LOSSES[caches[1]]
            if stored + kept <= memory and kept <= cache:
                found.append((loss, dict(zip(("a", "b"), caches, strict=True))))
    return min(found, key=lambda item: item[0], default=None)


@pytest.mark.parametrize("memory", [7600, 9000, 11500, 14000, 17000, 19000, 20000])
@pytest.mark.parametrize("cache", [10**9, 11000])
def test_one_program_trades_weights_against_caches(joint, memory, cache):
    ask = Ask(f"memory_bytes<={memory}", limits=(f"kv_cache_bytes<={cache}",))
    answer, expected = solve_budget(joint, ask), best(joint.inventory, memory, cache)
    if expected is None:
        assert answer.status == "infeasible"
        return
    assert answer.solution.objective == pytest.approx(expected[0])
    caches = {name: scheme for name, scheme in answer.plan.assignment.items() if name in ("a", "b")}
    assert caches == expected[1]
    assert answer.plan.kv_cache == {name: scheme.removeprefix("kv-") for name, scheme in caches.items()}
    used = answer.result["resources"]
    assert used["kv_cache_bytes"] == sum(cache_bytes(name, scheme) for name, scheme in caches.items())
    assert used["memory_bytes"] == answer.plan.totals.checkpoint_bytes + used["kv_cache_bytes"]
    assert used["bits_per_weight"] == answer.plan.totals.bits_per_weight


def test_pins_and_ties_of_caches_go_by_attention_layer(joint):
    ask = Ask("memory_bytes<=14000", pins={"b": "kv-int8", "*": "w8"})
    plan = solve_budget(joint, ask).plan
    assert plan.kv_cache["b"] == "int8"
    assert set(plan.weights.values()) == {"w8"}
    tied = Ask("kv_cache_bytes<=15000", ties=(("*",),))
    plan = solve_budget(joint, tied).plan
    assert len(set(plan.kv_cache.values())) == len(set(plan.weights.values())) == 1
    free = solve_budget(joint, Ask("kv_cache_bytes<=15000")).plan
    assert len(set(free.kv_cache.values())) == 2
    assert expand_ties(joint.inventory, [["a", "b"]], ("a", "b")) == (("a", "b"),)


def test_a_runtime_may_have_one_type_for_all_caches(joint):
    budget = "kv_cache_bytes<=12000"
    plan = solve_budget(joint, Ask(budget, runtime="openvino")).plan
    assert plan.kv_cache == {"a": "int8", "b": "int8"}
    assert lint(plan, RUNTIMES["openvino"]) == ()
    with pytest.raises(RuntimeRefuses, match="torchao keeps no type of cache that can be decided"):
        compile_ask(joint, Ask(budget, runtime="torchao"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pins": {"a.q": "kv-int8"}}, PatternError, "Got 'a.q', which matches nothing"),
        ({"pins": {"b": "w4"}}, PatternError, "Got 'b', which matches nothing"),
        ({"ties": (("a.q", "a"),)}, CompileError, "at least two of one kind. Got the weight a.q and"),
    ],
)
def test_weights_and_caches_are_not_mixed_up(joint, changes, error, words):
    with pytest.raises(error, match=words):
        compile_ask(joint, Ask("4 bpw", **changes))


def test_a_pin_of_a_cache_needs_a_search_that_decides_caches(inputs):
    with pytest.raises(PatternError, match="must be for a search that decides caches"):
        compile_ask(inputs, Ask("4 bpw", pins={"*": "kv-int8"}))


def test_a_missing_score_of_a_cache_is_named(joint):
    values = joint.table.metrics["output_kl"].values.copy()
    values[4, joint.table.schemes.index("kv-int4")] = np.nan
    table = replace(joint.table, metrics={"output_kl": MetricTable("min", values)})
    with pytest.raises(ScoresMissing, match="Got none for b x kv-int4"):
        compile_ask(replace(joint, table=table), Ask("4 bpw"))
    pinned = Ask("4 bpw", pins={"b": "kv-int8"})
    assert solve_budget(replace(joint, table=table), pinned).plan.kv_cache["b"] == "int8"


def wide(name: str, columns: int) -> Layer:
    return replace(layer(name), weight_shape=(64, columns), matrix=(64, columns), parameters=64 * columns)


@pytest.fixture
def mixed():
    """Layers of which vLLM's kernels for w4 take the first alone."""
    found = Inventory((wide("m.0.a", 128), wide("m.0.b", 96), wide("m.1.b", 96)), (), 20480, 0)
    menu = ("w2", "w4", "w8-aint8")
    return PlanningInputs(found, score_table(found, menu, rows(found, menu), ["output_kl"]), menu)


def test_an_infeasible_answer_names_the_runtimes_rules_that_forbid_smaller_schemes(mixed):
    found = solve_budget(mixed, Ask("3 bpw", runtime="vllm"))
    assert found.status == "infeasible"
    reason = found.result["reason"]
    assert reason.startswith("no plan is within the limit on bits_per_weight; vllm forbids smaller schemes")
    assert "w4: columns must be a multiple of 128, not 96 (m.0.b and 1 more layers)" in reason
    assert "symmetric" in reason
    assert "; not w2 (m.0.a and 2 more layers)" in reason
    free = solve_budget(mixed, Ask("1 bpw"))
    assert free.result["reason"] == "no plan is within the limit on bits_per_weight"
    pinned = solve_budget(mixed, Ask("1 bpw", pins={"*": "w8-aint8"}, runtime="vllm"))
    assert pinned.result["reason"] == free.result["reason"]


def test_uniform_rivals_are_those_that_the_runtime_runs_on_every_layer(mixed):
    assert set(uniform_assignments(mixed, Ask("9 bpw"))) == {f"uniform {name}" for name in mixed.menu}
    found = uniform_assignments(mixed, Ask("9 bpw", runtime="vllm"))
    assert set(found) == {"uniform w8-aint8"}
    pins = {"m.*.b": "w8-aint8"}
    found = uniform_assignments(mixed, Ask("9 bpw", pins=pins, runtime="vllm"))
    assert set(found) == {"uniform w4", "uniform w8-aint8"}
    assert found["uniform w4"] == {"m.0.a": "w4", "m.0.b": "w8-aint8", "m.1.b": "w8-aint8"}


def test_each_rule_of_a_runtime_has_its_price(inventory):
    inputs, ask = wide_inputs(inventory), Ask("6.9 bpw", runtime="vllm")
    question = question_of(inputs, ask, ask.all_limits)
    fuses, forbids = question.restrictions
    assert "fuses q_proj, k_proj, v_proj" in fuses.name
    assert {name: list(schemes) for name, schemes in forbids.forbidden.items()} == {
        name: ["w2"] for name in inputs.table.layer_names
    }
    found = explain(question, solve_budget(inputs, ask).solution, draws=0)
    offered = {"table": inputs.table, "limits": ask.all_limits, "schemes": MENU}
    apart = compile_problem(**offered, forbidden=forbidden_in(inputs.inventory, MENU, "vllm"))
    every = [apart, compile_ask(inputs, replace(ask, runtime=None))]
    assert [found.reliefs[0].objective, found.reliefs[2].objective] == [
        solve(compiled.problem).objective for compiled in every
    ]
    assert 0 < found.reliefs[0].share <= found.reliefs[2].share
    assert [relief.unscored for relief in found.reliefs] == [0, 0, 0]
    some = score_table(
        inputs.inventory, MENU, [row for row in rows(inputs.inventory) if row.scheme != "w2"], ["output_kl"]
    )
    unknown = question_of(replace(inputs, table=some), ask, ask.all_limits)
    assert [one.unscored for one in unknown.restrictions] == [0, 3]


def test_pins_protections_and_ties_that_contradict_each_other_are_named(inputs):
    ask = Ask("9 bpw", pins={"a.*": "w4", "a.k": "w2"}, ties=(("a.k", "emb"),), protect=("emb", "a.q"))
    answer = solve_budget(inputs, ask)
    conflict = answer.result["conflict"]
    assert {member["name"] for member in conflict["members"]} == {"a.k=w2", "a.k+emb", "protected emb"}
    assert all(member["objective"] is not None for member in conflict["members"])
    assert conflict["smallest"]
    freed = solve_budget(inputs, replace(ask, ties=()))
    assert freed.plan.assignment == {"a.q": "w4", "a.k": "w2", "emb": "w8"}
    assert freed.result["conflict"] is None


def test_a_question_is_found_again_in_its_request() -> None:
    ask = Ask(
        "3 bpw",
        ("bytes<=2 MiB",),
        {"a": "w4"},
        (("a", "b"),),
        "sqnr",
        2.0,
        1e-3,
        "vllm",
        {"latency": "roofline:h100"},
        ("c",),
        {"plans": "weighted"},
        {"head": "5 bpw"},
        "minimax",
        {"b": ("w2", "w3")},
    )
    request = {**ask.as_request("sqnr"), "contexts": ask.contexts}
    assert Ask.of(request, ask.budget, "sqnr") == ask
