"""Routers of experts: who saw what, and what quantizing does to their choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from sensitivity.errors import MetricNotOffered
from sensitivity.forwards import Forwards
from sensitivity.routers import coverage, router_divergence
from sensitivity.session import Session
from sensitivity.tasks.task import Batch
from sensitivity.units import InspectUnit, ScoreUnit

Tiny = Callable[[str], Any]
KINDS = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe", "llama4_text")


def naive_kl(session: Session, layer: str, scheme: str) -> np.ndarray[Any, Any]:
    """Every router's logits of whole runs, from what transformers gives its experts' gate."""
    routers = session.forwards.routers

    def logits(assignment: tuple[tuple[str, str], ...]) -> list[list[torch.Tensor]]:
        batches = []
        for batch in session.forwards.batches("scoring"):
            said: dict[str, torch.Tensor] = {}

            def keep(m: Any, inputs: Any, _: Any, path: str, said: dict[str, torch.Tensor] = said) -> None:
                bias = 0 if getattr(m, "bias", None) is None else m.bias
                said[path] = inputs[0] @ m.weight.T + bias

            handles = [
                session.model.get_submodule(path).register_forward_hook(partial(keep, path=path))
                for path in routers
            ]
            session.forwards.outputs(batch, assignment)
            for handle in handles:
                handle.remove()
            batches.append([said[path].reshape(batch.size, -1, said[path].shape[-1]) for path in routers])
        return batches

    found = []
    for before, after in zip(logits(()), logits(((layer, scheme),)), strict=True):
        p, q = (torch.stack([x.double().softmax(-1) for x in xs]) for xs in (before, after))
        found.append((p * (p / q).log()).sum(-1).mean(-1).mean(0))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_router_kl_is_its_definition(kind: str, tiny_experts: Any, tiny: Tiny) -> None:
    session = Session(tiny(kind).spec())
    assert session.forwards.routers
    layer = session.inventory.layers[0].name
    row = session.run(ScoreUnit(layer, "w2", ("router_kl",))).scores[0]
    expected = naive_kl(session, layer, "w2")
    assert row.value == pytest.approx(expected.mean(), rel=1e-4)
    assert row.stderr == pytest.approx(expected.std(ddof=1) / np.sqrt(len(expected)), rel=1e-4)
    assert row.value > 0


def test_a_routers_own_rounded_inputs_are_seen(tiny: Tiny) -> None:
    session = Session(tiny("mixtral").spec(include=("*.gate",)))
    router = session.forwards.routers[0]
    plain, rounded = (
        session.run(ScoreUnit(router, scheme, ("router_kl",))).scores[0].value
        for scheme in ("w8", "w8-aint4")
    )
    assert rounded == pytest.approx(naive_kl(session, router, "w8-aint4").mean(), rel=1e-4)
    assert rounded > 2 * plain


def test_rounded_activations_are_seen(tiny: Tiny) -> None:
    session = Session(tiny("mixtral").spec())
    layer = next(layer.name for layer in session.inventory.layers if layer.op == "linear")
    plain, rounded = (
        session.run(ScoreUnit(layer, scheme, ("router_kl",))).scores[0].value for scheme in ("w8", "w8-aint4")
    )
    assert rounded > 2 * plain


def test_logits_are_kept_whole_within_the_bound_until_they_are_forgotten(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tiny("mixtral").spec())
    change = ((session.inventory.layers[0].name, "w2"),)

    def divergence(forwards: Forwards) -> list[float]:
        pairs = forwards.router_pairs("scoring", change)
        return [value for before, after, batch in pairs for value in router_divergence(before, after, batch)]

    def opened(bound: int) -> Forwards:
        forwards = Forwards(
            session.model, session.task, session.samples, session.weights, 4, reference_bytes=bound
        )
        runs, whole = [], forwards.outputs
        monkeypatch.setattr(forwards, "outputs", lambda batch: (runs.append(batch.size), whole(batch))[1])
        monkeypatch.setattr(forwards, "runs", runs, raising=False)
        return forwards

    kept, small = opened(2**20), opened(1)
    expected = divergence(kept)
    assert len(expected) == 6
    assert divergence(kept) == divergence(small) == divergence(small) == expected
    assert kept.runs == [4, 2]
    assert small.runs == [4, 4, 2, 4, 2]
    kept.forget()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "outputs", Mock(side_effect=[None, RuntimeError("in the middle")]))
        with pytest.raises(RuntimeError, match="in the middle"):
            divergence(kept)
    assert divergence(kept) == expected


def test_what_no_router_sees_scores_zero(tiny: Tiny) -> None:
    session = Session(tiny("mixtral").spec())
    last = [layer.name for layer in session.inventory.layers if layer.name.endswith("down_proj")][-1]
    assert session.run(ScoreUnit(last, "w2", ("router_kl",))).scores[0].value == 0


def test_models_without_experts_do_not_offer_it(tiny: Tiny) -> None:
    session = Session(tiny("llama").spec())
    facts = session.run(InspectUnit()).facts
    assert "router_kl" not in facts["available_metrics"]
    assert facts["experts"] == {}
    with pytest.raises(MetricNotOffered, match="router_kl needs experts"):
        session.run(ScoreUnit(session.inventory.layers[0].name, "w2", ("router_kl",)))


def test_experts_count_their_tokens(tiny_experts: Any) -> None:
    """Against the routers' own decisions: two of four experts for each real token."""
    model = tiny_experts("mixtral")
    tokens = torch.arange(3, 33).reshape(3, 10)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith("mlp.gate"):
            module.register_forward_hook(lambda m, i, o, path=path: seen.update({path: o[-1]}))
    batch = Batch({"input_ids": tokens, "attention_mask": mask}, None, None, 3)
    counts = coverage(model, [batch])
    assert len(counts) == 2
    for path, found in counts.items():
        chosen = seen[path.replace("experts", "gate")].reshape(3, 10, 2)[mask.bool()]
        assert found == torch.bincount(chosen.flatten(), minlength=4).tolist()
        assert sum(found) == 2 * int(mask.sum())


def test_a_list_of_experts_counts_too() -> None:
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x) + self.experts[2](x[:, :1])

    batch = Batch({"x": torch.randn(2, 5, 4)}, None, None, 2)
    assert coverage(Mixture(), [batch, batch]) == {"experts": [20, 0, 4]}
