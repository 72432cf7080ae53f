"""Runs that begin at the block that changes give what runs of the whole model give, bit for bit, for less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sensitivity.forwards import Assignment, Forwards
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import InspectUnit, MeasureUnit, ScoreUnit

NAMES = ("llama", "tied", "bert", "resnet", "mlp", "mixtral")


@pytest.fixture(scope="module")
def session(tiny: Any) -> Callable[[str], Session]:
    kept: dict[str, Session] = {}

    def get(name: str) -> Session:
        if name not in kept:
            kept[name] = Session(tied_spec(tiny) if name == "tied" else tiny(name).spec())
        return kept[name]

    return get


def tied_spec(tiny: Any) -> SessionSpec:
    """The tiny Llama with its head tied to its embedding, which takes part."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tiny("llama")
    folder = source.folder / "tied"
    if not folder.exists():
        config = LlamaConfig.from_pretrained(source.folder, tie_word_embeddings=True)
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((source.folder / name).read_bytes())
    model = ModelSource("folder", str(folder), "tied")
    return source.spec(model=model, include=("model.embed_tokens",))


def fresh(session: Session, **bounds: int) -> Forwards:
    return Forwards(
        session.model, session.task, session.samples, session.weights, session.spec.batch_size, **bounds
    )


def whole(forwards: Forwards, part: str, assignment: Assignment) -> list[Tensor]:
    return [forwards.outputs(batch, assignment).rows for batch in forwards.batches(part)]


def resumed(forwards: Forwards, part: str, assignment: Assignment) -> list[Tensor]:
    return [pair.outputs.rows for pair in forwards.pairs(part, assignment)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_alone_gives_what_the_whole_model_gives(
    name: str, session: Callable[[str], Session]
) -> None:
    kept = session(name)
    forwards, layers = fresh(kept), kept.inventory.layers
    for scheme in ("w2", "w4"):
        for layer in layers:
            change = ((layer.name, scheme),)
            assert_equal(resumed(forwards, "scoring", change), whole(forwards, "scoring", change))
    assert forwards.resuming.fault is None
    assert len(forwards.resuming.blocks.paths) >= 2
    assert forwards.spent < 0.95 * 6 * (1 + 2 * len(layers)) + 4 * len(layers)


@pytest.mark.parametrize("name", NAMES)
def test_plans_that_share_their_first_layers_share_their_first_blocks(
    name: str, session: Callable[[str], Session]
) -> None:
    kept = session(name)
    forwards, layers = fresh(kept), [layer.name for layer in kept.inventory.layers]
    plan = {layer: ("w2", "w3", "w4")[number % 3] for number, layer in enumerate(layers)}
    plans = [
        plan,
        {**plan, layers[-1]: "w8", layers[-2]: "w8"},
        {**plan, layers[-1]: "w5", layers[-2]: "w6"},
        {**plan, layers[0]: "w8"},
    ]
    cost = []
    for assignment in (tuple(sorted(some.items())) for some in plans):
        before = forwards.spent
        assert_equal(resumed(forwards, "choosing", assignment), whole(forwards, "choosing", assignment))
        cost.append(forwards.spent - before)
    assert forwards.resuming.fault is None
    assert cost[2] < 6
    assert cost[3] == 6


def test_a_changed_layer_costs_the_blocks_from_its_own_on(session: Callable[[str], Session]) -> None:
    kept = session("llama")
    forwards = fresh(kept)
    reuse = forwards.reuse()
    shares = reuse["shares"]
    assert reuse["kept_bytes"] == 2 * 6 * reuse["bytes"] == 2 * 6 * 12 * 16 * 4
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert shares[first] == 1
    assert 0.4 < shares[last] < 0.7
    for scheme in ("w2", "w3"):  # the first run of a layer is checked against the whole model
        resumed(forwards, "scoring", ((last, scheme),))
    before = forwards.spent
    resumed(forwards, "scoring", ((last, "w4"),))
    assert forwards.spent - before == pytest.approx(6 * shares[last], abs=1e-4)


@pytest.mark.parametrize("bound", [0, 2000, 20_000])
def test_a_small_bound_costs_passes_and_changes_nothing(
    bound: int, session: Callable[[str], Session]
) -> None:
    kept = session("llama")
    forwards, free = fresh(kept, prefix_bytes=bound, reference_bytes=0), fresh(kept)
    for layer in [layer.name for layer in kept.inventory.layers][::3]:
        for scheme in ("w2", "w4"):
            change = ((layer, scheme),)
            assert_equal(resumed(forwards, "scoring", change), whole(forwards, "scoring", change))
            resumed(free, "scoring", change)
            assert forwards.resuming._prefixes._held <= bound
    assert forwards.spent > free.spent


def test_corrected_plans_and_rounded_caches_are_measured_as_whole_runs(
    session: Callable[[str], Session],
) -> None:
    kept = session("resnet")
    forwards, layers = fresh(kept), [layer.name for layer in kept.inventory.layers]
    for last in ("w2", "w3", "w4"):
        plan = tuple(sorted([*((name, "w3") for name in layers[:-1]), (layers[-1], last)]))
        corrected = kept.corrections.tensors(plan, ("bias", "batch_norm"))
        expected = [forwards.outputs(batch, plan, corrected).rows for batch in forwards.batches("choosing")]
        assert_equal([pair.outputs.rows for pair in forwards.pairs("choosing", plan, corrected)], expected)
    assert forwards.spent < 3 * 6 + 6 + 4
    kept = session("llama")
    forwards = fresh(kept)
    for cache in ("kv-int8", "kv-int4"):
        plan = (("*", cache), ("model.layers.1.mlp.down_proj", "w4"))
        assert_equal(resumed(forwards, "choosing", plan), whole(forwards, "choosing", plan))


class Skips(nn.Module):
    """A value flows around the blocks, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x).relu()
        return x + first


def build_skips() -> nn.Module:
    torch.manual_seed(1)
    return Skips()


@pytest.fixture
def skips(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Session:
    (tmp_path / "skips_factory.py").write_text("import sys\nbuild = sys.skips_build\n", encoding="utf-8")
    monkeypatch.setattr("sys.skips_build", build_skips, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    save_file({"x": torch.randn(20, 4)}, tmp_path / "x.safetensors")
    data = DataSource(str(tmp_path / "x.safetensors"), "safetensors", "d")
    return Session(
        SessionSpec(ModelSource("factory", "skips_factory:build", "m"), data, samples=6, batch_size=4)
    )


def test_models_whose_blocks_are_no_chain_run_whole_and_say_so(skips: Session) -> None:
    for layer in skips.inventory.layers:
        for scheme in ("w2", "w4"):
            change = ((layer.name, scheme),)
            found = resumed(skips.forwards, "scoring", change)
            assert_equal(found, whole(skips.forwards, "scoring", change))
    reuse = skips.run(InspectUnit()).facts["reuse"]
    assert reuse["whole"] == "beginning at block blocks.1 gave other outputs"
    assert set(reuse["shares"].values()) == {1.0}


def test_what_a_unit_cost_is_told(tiny: Any) -> None:
    kept = Session(tiny("llama").spec())
    last = kept.inventory.layers[-1].name
    costs = [kept.run(ScoreUnit(last, f"w{bits}", ("output_kl",))).facts["forwards"] for bits in (2, 3, 4)]
    share = kept.run(InspectUnit()).facts["reuse"]["shares"][last]
    # references; one batch of four whole and again from its block; two samples from the block
    assert costs[0] == pytest.approx(6 + 4 + 6 * share, abs=1e-3)
    assert costs[1:] == pytest.approx([6 * share] * 2, abs=1e-3)
    plan = tuple((layer.name, "w4") for layer in kept.inventory.layers)
    spent = [kept.run(MeasureUnit(plan, "choosing")).facts["forwards"] for _ in range(2)]
    assert spent[0] == 12
    assert spent[1] < 6
    assert all(np.isfinite(spent))


def test_a_part_that_does_not_fit_is_not_tried_again(session: Callable[[str], Session]) -> None:
    """Six samples, of which the first micro-batch of four is computed once to see that they do not fit."""
    forwards = fresh(session("mlp"), reference_bytes=1, prefix_bytes=0)
    costs = []
    for _ in range(3):
        before = forwards.spent
        assert len(list(forwards.references("choosing"))) == 2
        costs.append(forwards.spent - before)
    assert costs == [4 + 6, 6, 6]
