"""What fused experts multiply: each only the tokens routed to it, the inner products as the module makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.catalog import QUANTIZERS
from quant.experts import expert_inputs, routed
from quant.inventory import take_inventory
from quant.ops import to_matrix
from sensitivity import inputs as inputs_module
from sensitivity.inputs import InputStatistics
from sensitivity.session import Session
from sensitivity.tasks.task import Batch
from sensitivity.units import BlockUnit, ScoreUnit

KINDS = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "nemotron_h")
TOKENS = torch.arange(3, 33).reshape(3, 10)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_times_the_weights_are_the_outputs(kind: str, tiny_experts: Callable[..., Any]) -> None:
    model = tiny_experts(kind)
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = []
    for module in experts_modules(model):
        module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)  # type: ignore[arg-type]
        for name, bias in module.named_parameters():
            if name.endswith("bias"):
                bias.data = torch.randn_like(bias)
    with torch.no_grad():
        model(TOKENS)
        for module, arguments, named, output in calls:
            call = routed(module, arguments, named)
            assert call is not None
            hidden, indices = call
            found = torch.zeros_like(hidden)
            op = "experts_transposed" if kind in ("gpt_oss", "llama4_text") else "experts"
            weights = to_matrix(module.down_proj, op).reshape(4, 16, 12)  # type: ignore[arg-type]
            for expert, rows in expert_inputs(module, "down_proj", hidden, indices):
                at, slot = torch.where(indices == expert)
                product = rows @ weights[expert].t()
                if kind == "gpt_oss":
                    product = product + module.down_proj_bias[expert]  # type: ignore[index]
                share = arguments[2][at, slot, None] if len(arguments) > 2 else 1.0
                found[at] += product * share
            torch.testing.assert_close(found, output.reshape(found.shape))


def batches() -> list[Batch]:
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    return [Batch({"input_ids": TOKENS, "attention_mask": mask}, None, None, len(TOKENS))]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_per_expert_and_without_padding(kind: str, tiny_experts: Callable[..., Any]) -> None:
    model = tiny_experts(kind)
    inventory = take_inventory(model)
    roomy, tight = (InputStatistics(model, inventory, batches, cache_bytes=size) for size in (2**30, 5000))
    layers = [layer for layer in inventory.layers if layer.experts > 1]
    chosen = 1 if kind == "llama4_text" else 2
    for layer in layers:
        found = roomy(layer.name)
        assert found.second_moments.shape == (4, layer.matrix[1], layer.matrix[1])
        assert found.samples == 26 * chosen
        found.require(layer.matrix)
        assert torch.equal(found.second_moments, tight(layer.name).second_moments)
    other = roomy(inventory.layers[0].name)
    assert other.samples == 26


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gptq_lowers_the_error_at_the_experts_outputs(kind: str, tiny: Callable[[str], Any]) -> None:
    session = Session(tiny(kind).spec())
    for layer in session.inventory.layers:
        if layer.experts > 1:
            known, errors = session.inputs(layer.name), {}
            for scheme in ("w3", "w3-gptq"):
                error = session.weights.error(layer.name, scheme).reshape(layer.weight_shape)
                errors[scheme] = float(known.output_errors(to_matrix(error, layer.op)).sum())
            assert errors["w3-gptq"] < errors["w3"]
    unit = ScoreUnit("model.layers.0.mlp.experts.down_proj", "w3-gptq", ("output_kl",))
    assert session.run(unit).scores == Session(tiny(kind).spec()).run(unit).scores


def test_statistics_that_are_too_large_are_left_out(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tiny("mixtral").spec())
    monkeypatch.setattr(inputs_module, "LARGEST_BYTES", 3000)
    layer = "model.layers.0.mlp.experts.gate_up_proj"
    assert session.inputs(layer).samples == 0
    assert torch.equal(session.weights.quantized(layer, "w3-gptq"), session.weights.quantized(layer, "w3"))


def test_an_embedding_is_rounded_as_without_inputs(tiny: Callable[[str], Any]) -> None:
    session = Session(tiny("llama").spec(include=("model.embed_tokens",)))
    found = [session.weights.quantized("model.embed_tokens", scheme) for scheme in ("w3-gptq", "w3")]
    assert torch.equal(*found)


class Own(nn.Module):
    """Experts of a user's own, which do not tell how they gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
        self.down_proj = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, hidden: Tensor, indices: Tensor) -> Tensor:
        both = torch.einsum("th,teoh->teo", hidden, self.gate_up_proj[indices])
        gate, up = both.chunk(2, dim=-1)
        return torch.einsum("tei,tehi->th", gate.relu() * up, self.down_proj[indices])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = Own(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.gate(x).topk(2, dim=-1).indices)  # type: ignore[no-any-return]


def test_inputs_inside_unknown_experts_are_left_out_and_those_outside_are_not() -> None:
    model = nn.Sequential(Block())
    inventory = take_inventory(model, run=lambda: len(model(torch.randn(7, 5))))
    assert inventory.by_name["0.experts.down_proj"].macs == 2 * 5 * 3
    batch = Batch({"x": torch.randn(7, 5)}, None, "x", 7)
    known = InputStatistics(model, inventory, lambda: [batch])
    assert known("0.experts.gate_up_proj").samples == 14
    assert known("0.experts.down_proj").samples == 0


def test_a_call_that_cannot_be_read_is_passed_over() -> None:
    block = Block()
    block.experts.forward = lambda hidden, indices: hidden  # type: ignore[method-assign]
    inventory = take_inventory(nn.Sequential(block))
    layer = replace(inventory.by_name["0.experts.gate_up_proj"])
    model = nn.Sequential(block)
    block.forward = lambda x: block.experts(x, x)  # type: ignore[method-assign]
    known = InputStatistics(model, inventory, lambda: [Batch({"x": torch.randn(7, 5)}, None, "x", 7)])
    assert known(layer.name).samples == 0


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_router_that_takes_part_has_every_score(kind: str, tiny: Callable[[str], Any]) -> None:
    session = Session(tiny(kind).spec(include=("*.mlp.gate",) if kind == "mixtral" else ("*.router",)))
    (layer, *_) = [layer.name for layer in session.inventory.layers if layer.matrix == (4, 16)]
    assert session.inputs(layer).samples == session.inputs(session.inventory.layers[0].name).samples
    result = session.run(ScoreUnit(layer, "w2-gptq", ("output_kl", "layer_output_error")))
    assert all(row.value > 0 for row in result.scores)
    arrays = session.run(BlockUnit("gradient_output", "samples:0:2", ("w2", "w8"), (layer,))).arrays
    (values,) = arrays.values()
    assert values.shape == (2, 1, 2)
    assert (values[:, 0, 0] > values[:, 0, 1]).all()


@pytest.mark.parametrize(
    "quantizer", [q.name for q in QUANTIZERS.values() if q.adjusts is None or not q.adjusts.divides_inputs]
)
def test_every_quantizer_takes_experts(quantizer: str, tiny: Callable[[str], Any]) -> None:
    session = Session(tiny("gpt_oss").spec())
    name = "model.layers.0.mlp.experts.down_proj"
    adjusts = QUANTIZERS[quantizer].adjusts
    scheme = f"w3-{quantizer}{2 if adjusts is not None and adjusts.parameter else ''}"
    assert session.weights.quantized(name, scheme).shape == session.weights.parameter(name).shape
    known, layer = session.inputs(name), session.weights.layer(name)

    def output_error(other: str) -> float:
        error = session.weights.error(name, other).reshape(layer.weight_shape)
        return float(known.output_errors(to_matrix(error, layer.op)).sum())

    assert 0 < output_error(scheme) < output_error("w2-rtn")
