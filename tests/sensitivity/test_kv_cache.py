"""Models that run with a rounded cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quant.codecs.kv_cache import round_cached
from quant.plan import Certificate, Digests, plan_json
from quant.planning import build_plan
from sensitivity.catalog import SCORERS, offered_metrics
from sensitivity.errors import BadUnit, MetricNotOffered
from sensitivity.kv_cache import attention_layers, model_geometry, rounded_cache
from sensitivity.session import Session
from sensitivity.units import BlockUnit, MeasureUnit, ScoreUnit
from service.cli.main import app
from service.local_inputs import folder_source

Tiny = Callable[[str], Any]
FIRST = "model.layers.0.self_attn"
KINDS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")


def divergence(session: Session, *pairs: tuple[str, str]) -> Any:
    return session.run(MeasureUnit(pairs, "choosing")).arrays["divergence"]


def test_attention_layers_are_found_by_their_number(tiny: Tiny) -> None:
    found = attention_layers(Session(tiny("llama").spec()).model)
    assert found == {FIRST: 0, "model.layers.1.self_attn": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_sees_rounded_keys_and_values(
    kind: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are not rotated: what attention gets is what the projection gave, rounded."""
    from transformers.models.llama import modeling_llama

    session = Session(tiny("llama").spec())
    model, batch = session.model, next(iter(session.forwards.batches("choosing")))
    attention, seen = model.get_submodule(FIRST), {}
    original = modeling_llama.eager_attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        if module is attention:
            seen.update(key=key, value=value)
        return original(module, query, key, value, *rest, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", spy)
    model.set_attn_implementation("eager")
    attention.v_proj.register_forward_hook(lambda module, given, out: seen.update(projected=out))
    with rounded_cache(model, {FIRST: f"kv-{kind}"}), torch.inference_mode():
        batch.call(model)
    samples, tokens, _ = seen["projected"].shape
    heads = seen["projected"].reshape(samples, tokens, 1, 8).transpose(1, 2)
    assert torch.equal(seen["value"], round_cached(heads, kind))
    torch.testing.assert_close(round_cached(seen["key"], kind), seen["key"], rtol=2e-3, atol=1e-6)


def test_plans_and_caches_are_measured_together_and_repeatably(tiny: Tiny) -> None:
    one, two = Session(tiny("llama").spec()), Session(tiny("llama").spec())
    weight = ("model.layers.1.mlp.up_proj", "w4-aint8")
    cases: list[tuple[tuple[str, str], ...]] = [
        ((FIRST, "kv-int4"),),
        ((FIRST, "kv-int8"),),
        (("*", "kv-int4"),),
        (weight, ("*", "kv-fp8_e4m3"), (FIRST, "kv-float32")),
    ]
    first = [divergence(one, *case) for case in cases]
    second = [divergence(two, *case) for case in reversed(cases)][::-1]
    assert all(np.array_equal(mine, other) for mine, other in zip(first, second, strict=True))
    four, eight, all_four, _ = (values.mean() for values in first)
    assert 0 < eight < four < all_four
    assert not divergence(one).any()
    assert not divergence(one, ("*", "kv-float32")).any()


def test_what_has_no_such_cache_is_refused(tiny: Tiny) -> None:
    llama = Session(tiny("llama").spec())
    with pytest.raises(BadUnit, match="type of a cache must be one of full, float32"):
        divergence(llama, (FIRST, "kv-int3"))
    with pytest.raises(BadUnit, match="matches nothing"):
        divergence(llama, ("model.layers.7.self_attn", "kv-int8"))
    for name in ("resnet", "mlp", "bert"):
        with pytest.raises(BadUnit, match="cache"):
            divergence(Session(tiny(name).spec()), ("*", "kv-int8"))
    assert not llama.model._forward_pre_hooks
    assert not llama.model._forward_hooks


@pytest.mark.parametrize("kind", ["full", *KINDS])
def test_scores_of_a_cache_are_the_divergence_of_the_rounded_model(kind: str, tiny: Tiny) -> None:
    session = Session(tiny("llama").spec())
    scheme, metrics = f"kv-{kind}", ("output_kl", "output_mse", "sqnr", "gram_output", "loss_delta")
    result = session.run(ScoreUnit(FIRST, scheme, metrics))
    expected, squares = [], []
    for batch, reference in zip(
        session.forwards.batches("scoring"), session.forwards.references("scoring"), strict=True
    ):
        with rounded_cache(session.model, {FIRST: scheme}), torch.inference_mode():
            outputs = session.task.outputs(session.model, batch)
        expected.append(session.task.divergence(reference, outputs))
        squares.append(float((outputs.rows - reference.rows).double().square().sum()))
    found = {row.metric: row for row in result.scores}
    assert found["output_kl"].value == np.concatenate(expected).mean()
    assert (found["output_mse"].value > 0) == (sum(squares) > 0) == (kind != "full")
    assert found["sqnr"].value == 200.0 if kind == "full" else found["sqnr"].value < 100.0
    assert all((row.layer, row.scheme) == (FIRST, scheme) for row in result.scores)
    own = float((result.arrays["sketch"].astype(np.float64) ** 2).sum())
    assert own == pytest.approx(found["gram_output"].value, rel=1e-3)


def test_interactions_know_how_caches_and_weights_add_up(tiny: Tiny) -> None:
    """KL of both = their own and twice the inner product of their sketches: closer than the sum of two."""
    session = Session(tiny("llama").spec())
    chosen = [(FIRST, "kv-int4"), ("model.layers.0.self_attn.v_proj", "w4")]
    results = [session.run(ScoreUnit(*pair, ("gram_output",))) for pair in chosen]
    cache, weight = (result.arrays["sketch"].astype(np.float64) for result in results)
    alone = sum(result.scores[0].value for result in results)
    pairs = session.forwards.pairs("scoring", tuple(chosen))
    both = np.concatenate([session.task.divergence(pair.reference, pair.outputs) for pair in pairs]).mean()
    inner = 2 * float(cache @ weight)
    assert abs(inner) > 0.01 * both
    assert abs(alone + inner - both) < abs(alone - both)


MEASURED = [
    name
    for name in offered_metrics("causal_lm", has_labels=True, has_experts=False)
    if SCORERS[name].unit != "roles"
]


@pytest.mark.parametrize("metric", MEASURED)
def test_a_metric_sees_caches_or_refuses_them(metric: str, tiny: Tiny) -> None:
    entry, session = SCORERS[metric], Session(tiny("llama").spec())
    if entry.sees_caches:
        full, rounded = (
            session.run(ScoreUnit(FIRST, f"kv-{kind}", (metric,))).scores[0] for kind in ("full", "int4")
        )
        assert (full.value, full.stderr) != (rounded.value, rounded.stderr)
        return
    unit: Any = ScoreUnit(FIRST, "kv-int8", (metric,))
    if entry.unit == "block":
        unit = BlockUnit(metric, "samples:0:2", ("w8", "kv-int8"), (FIRST,))
    with pytest.raises(MetricNotOffered, match=f"Got '{metric}', which looks at layers alone, for 'kv-int8'"):
        session.run(unit)


def test_geometry_names_the_attention_layers_that_can_be_decided(tiny: Tiny) -> None:
    found = model_geometry(Session(tiny("llama").spec()).model)
    assert found is not None
    assert found.attention == (FIRST, "model.layers.1.self_attn")
    bert = model_geometry(Session(tiny("bert").spec()).model)
    assert bert is not None
    assert bert.attention == ()
    assert model_geometry(Session(tiny("mlp").spec()).model) is None


def test_a_model_with_latent_attention_names_no_layers() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    config.architectures = ["DeepseekV3ForCausalLM"]
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    found = model_geometry(model)
    assert found is not None
    assert found.attention == ()


@pytest.mark.slow
def test_the_command_measures_a_plan_with_a_cache(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    inventory = Session(model.spec()).inventory
    plan = build_plan(
        inventory,
        {layer.name: "w8" for layer in inventory.layers},
        digests=Digests(model=folder_source(model.folder).digest),
        certificate=Certificate("optimal"),
        source="test",
    )
    file = tmp_path / "plan.json"
    file.write_text(plan_json(plan))
    arguments = ["evaluate", str(model.folder), "--plan", str(file), "--data", str(model.data), "--json"]
    arguments += ["--samples", "8", "--sequence-length", "12"]
    result = CliRunner().invoke(app, [*arguments, "--kv-cache", "int4", "--kv-cache", "*.0.*=float32"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["plan_and_cache"]["divergence"]["mean"] > found["plan"]["divergence"]["mean"]
    refused = CliRunner().invoke(app, [*arguments, "--kv-cache", "int3"])
    assert refused.exit_code == 2
    assert "--kv-cache must be TYPE or LAYERS=TYPE" in " ".join(refused.output.split())
