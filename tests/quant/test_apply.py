import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.apply import (
    ApplyError,
    NonFinite,
    encode_weight,
    fake_quantized,
    quantize_,
    quantized_weight,
    replaced_weights,
)
from quant.formats import codec_of
from quant.inventory import take_inventory
from quant.packing import decode
from quant.plan import Certificate, Digests
from quant.planning import build_plan
from quant.quantizers import mse_clip, rtn
from quant.schemes import parse_scheme


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.mix = Conv1D(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def model(request):
    torch.manual_seed(0)
    return Small(request.param)


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model, before):
    as_bytes = {name: value.reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}
    return all(torch.equal(as_bytes[name], before[name].reshape(-1).view(torch.uint8)) for name in before)


def inventory_of(model):
    return take_inventory(model, include=["embed"])


ALL = {"embed": "w3", "conv": "w4-g5-asym", "mix": "w2-rtn"}


def test_weights_are_what_the_formats_store(model):
    inventory = inventory_of(model)
    weights = snapshot(model)
    with fake_quantized(model, ALL, inventory) as inside:
        assert inside is model
        conv = decode(
            mse_clip.quantize(weights["conv.weight"].reshape(6, 18), parse_scheme("w4-g5-asym").weight)
        )
        assert torch.equal(model.conv.weight, conv.reshape(6, 2, 3, 3).to(model.conv.weight.dtype))
        mix = decode(rtn.quantize(weights["mix.weight"].t(), parse_scheme("w2").weight))
        assert torch.equal(model.mix.weight, mix.t().to(model.mix.weight.dtype))
        assert model.head.weight is model.embed.weight
        assert not torch.equal(model.head.weight, weights["embed.weight"])
    assert same(model, weights)


@pytest.mark.parametrize("spelling", ["w4-g5-asym", "w3", "fp8", "fp4", "bf16"])
def test_what_is_stored_decodes_to_what_is_measured(model, spelling):
    scheme, layer = parse_scheme(spelling), inventory_of(model).by_name["conv"]
    codec = codec_of(scheme.weight)
    packed = codec.pack(encode_weight(model.conv.weight, "conv2d", "conv", scheme))
    assert packed.nbytes == scheme.storage(layer.matrix).bytes
    stored = codec.decode(codec.unpack(packed)).reshape(layer.weight_shape).to(model.conv.weight)
    assert torch.equal(stored, quantized_weight(model.conv.weight, layer, scheme))


def test_the_same_memory_comes_back_after_an_exception(model):
    inventory, before = inventory_of(model), snapshot(model)
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    view = model.conv.weight.detach()[0]
    with pytest.raises(KeyError), fake_quantized(model, ALL, inventory):
        raise KeyError("inside")
    assert same(model, before)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == places
    assert torch.equal(view, before["conv.weight"][0])


def test_a_failure_halfway_restores_what_was_changed(model):
    inventory = inventory_of(model)
    with torch.no_grad():
        model.mix.weight[0, 0] = torch.nan
    before = snapshot(model)
    with (
        pytest.raises(NonFinite, match=r"in the weight of layer 'mix' with scheme 'w2-rtn'") as raised,
        fake_quantized(model, ALL, inventory),
    ):
        raise AssertionError("the block must not start")
    assert same(model, before)
    assert (raised.value.layer, raised.value.scheme) == ("mix", "w2-rtn")


def test_blocks_nest(model):
    inventory, before = inventory_of(model), snapshot(model)
    with fake_quantized(model, {"conv": "w8", "mix": "w8"}, inventory):
        outer = snapshot(model)
        with fake_quantized(model, {"conv": "w2"}, inventory):
            assert not same(model, outer)
        assert same(model, outer)
    assert same(model, before)


def test_negative_zero_and_gradients_survive():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before, inventory = snapshot(model), take_inventory(model)
    with fake_quantized(model, {"0": "w4"}, inventory):
        model(torch.ones(1, 3)).sum().backward()
    assert same(model, before)
    assert model[0].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))


def test_strided_and_channels_last_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    inventory, before, stride = take_inventory(model), snapshot(model), model[0].weight.stride()
    contiguous = quantized_weight(before["0.weight"].contiguous(), inventory.layers[0], "w3")
    with fake_quantized(model, {"0": "w3"}, inventory):
        assert torch.equal(model[0].weight, contiguous)
        assert model[0].weight.stride() == stride
    assert same(model, before)


def test_a_plan_is_an_assignment(model):
    inventory = inventory_of(model)
    plan = build_plan(inventory, ALL, digests=Digests(), certificate=Certificate("feasible"), source="test")
    with fake_quantized(model, ALL, inventory):
        by_names = snapshot(model)
    with fake_quantized(model, plan, inventory):
        assert same(model, by_names)


def test_an_alias_names_the_shared_tensor(model):
    inventory, before = inventory_of(model), snapshot(model)
    with fake_quantized(model, {"head": "w3", "embed": "w3"}, inventory):
        assert torch.equal(
            model.embed.weight, quantized_weight(before["embed.weight"], inventory.by_name["embed"], "w3")
        )
    with (
        pytest.raises(ApplyError, match="must get one scheme. Got w3 and w4 for embed, head"),
        fake_quantized(model, {"embed": "w3", "head": "w4"}, inventory),
    ):
        pass
    assert same(model, before)


def test_weights_at_hand_can_be_put_in(model):
    inventory, before = inventory_of(model), snapshot(model)
    zeros = torch.zeros_like(before["mix.weight"])
    with replaced_weights(model, {"mix": zeros}, inventory):
        assert torch.equal(model.mix.weight, zeros)
        assert torch.equal(model.conv.weight, before["conv.weight"])
    assert same(model, before)


def test_quantize_in_place_stays_and_checks_first(model):
    inventory, before = inventory_of(model), snapshot(model)
    place = model.conv.weight.data_ptr()
    with torch.no_grad():
        model.mix.weight[0, 0] = torch.inf
    with pytest.raises(NonFinite, match="layer 'mix'"):
        quantize_(model, ALL, inventory)
    assert torch.equal(model.conv.weight, before["conv.weight"])
    quantize_(model, {"conv": "w4-g5-asym"}, inventory)
    expected = quantized_weight(before["conv.weight"], inventory.by_name["conv"], "w4-g5-asym")
    assert torch.equal(model.conv.weight, expected)
    assert model.conv.weight.data_ptr() == place


def test_overflow_of_the_weights_own_type_is_named():
    model = nn.Sequential(nn.Linear(2, 1, dtype=torch.float16))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-65504.0, 40000.0]]))
    layer = take_inventory(model).layers[0]
    with pytest.raises(NonFinite, match=r"in torch.float16 after quantizing the weight of layer '0'"):
        quantized_weight(model[0].weight * 1.0, layer, "w2-asym-rtn")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"cnv": "w4"}, r"Got 'cnv'\. Names are like conv"),
        ({"conv": "w4-g64"}, r"Got w4-g64 for conv: groups of 64 are longer than the 18 columns"),
        ({"conv": "w44"}, "Weight bits must be 2 to 8"),
    ],
)
def test_assignments_must_fit(model, assignment, message):
    before, inventory = snapshot(model), inventory_of(model)
    with pytest.raises(ValueError, match=message), fake_quantized(model, assignment, inventory):
        pass
    assert same(model, before)


def test_the_inventory_must_be_the_models():
    inventory = take_inventory(nn.Sequential(nn.Linear(3, 4)))
    for other in (nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.ReLU()), nn.ModuleDict()):
        with pytest.raises(ApplyError, match=r"must have a weight of shape \(4, 3\) at '0'"):
            quantize_(other, {"0": "w4"}, inventory)
    with pytest.raises(ApplyError, match=r"must have the shape \(4, 3\) of the inventory"):
        quantized_weight(torch.zeros(3, 4), inventory.layers[0], "w4")
