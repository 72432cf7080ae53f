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
from sensitivity.errors import BadUnit
from sensitivity.kv_cache import attention_layers, rounded_cache
from sensitivity.session import Session
from sensitivity.units import MeasureUnit
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
    with pytest.raises(BadUnit, match="type of a cache must be one of float32"):
        divergence(llama, (FIRST, "kv-int3"))
    with pytest.raises(BadUnit, match="matches nothing"):
        divergence(llama, ("model.layers.7.self_attn", "kv-int8"))
    for name in ("resnet", "mlp", "bert"):
        with pytest.raises(BadUnit, match="cache"):
            divergence(Session(tiny(name).spec()), ("*", "kv-int8"))
    assert not llama.model._forward_pre_hooks
    assert not llama.model._forward_hooks


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
    assert "--kv-cache must be one of" in " ".join(refused.output.split())
