import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.inventory import AlreadyQuantized, InventoryError, NothingToQuantize, take_inventory
from quant.patterns import PatternError


def by_name(items):
    return {item.name: item for item in items}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.line = nn.Conv1d(6, 5, 2, stride=2)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(5, 8, bias=False)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(10, 8)})
        self.norm = nn.LayerNorm(10)
        self.up = nn.ConvTranspose1d(3, 3, 2)

    def forward(self, x):
        x = self.line(self.conv(x).flatten(2)).transpose(1, 2)
        return self.norm(self.mlp["c_fc"](self.attn["q_proj"](x)))


def run_mixed(model, samples=3):
    def run():
        model(torch.randn(samples, 4, 4, 4))
        return samples

    return run


def test_shapes_roles_and_macs():
    model = Mixed()
    layers = by_name(take_inventory(model, run=run_mixed(model)).layers)
    assert {name: (item.op, item.matrix, item.role) for name, item in layers.items()} == {
        "conv": ("conv2d", (6, 18), "convolution"),
        "line": ("conv1d", (5, 12), "convolution"),
        "attn.q_proj": ("linear", (8, 5), "self_attention"),
        "mlp.c_fc": ("transformers_conv1d", (10, 8), "feed_forward"),
    }
    assert {name: item.macs for name, item in layers.items()} == {
        "conv": 6 * 16 * 18,
        "line": 5 * 8 * 12,
        "attn.q_proj": 8 * 8 * 5,
        "mlp.c_fc": 8 * 10 * 8,
    }


def test_macs_are_unknown_without_a_forward_and_hooks_go_away():
    model = Mixed()
    assert {layer.macs for layer in take_inventory(model).layers} == {None}
    take_inventory(model, run=run_mixed(model))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InventoryError, match="at least one sample. Got 0"):
        take_inventory(model, run=lambda: 0)


def test_everything_stored_is_counted_once():
    model = Mixed()
    inventory = take_inventory(model)
    assert inventory.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    layer_bytes = sum(layer.stored_bytes for layer in inventory.layers)
    assert inventory.other_bytes + layer_bytes == sum(t.nbytes for t in model.state_dict().values())
    assert by_name(inventory.excluded)["up.weight"].reason.startswith("parameter of a module type")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.again = self.body
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.again(self.body(self.embed(ids))))


def run_tied(model):
    def run():
        model(torch.zeros(2, 5, dtype=torch.long))
        return 2

    return run


def test_shared_tensors_are_one_layer_with_aliases():
    model = Tied()
    inventory = take_inventory(model, include=["lm_head"], run=run_tied(model))
    layers = by_name(inventory.layers)
    assert layers["embed"].aliases == ("lm_head",)
    assert layers["embed"].macs == 5 * 20 * 8
    assert layers["body"].aliases == ("again",)
    assert layers["body"].macs == 2 * 5 * 8 * 8
    assert inventory.total_parameters == 20 * 8 + 8 * 8 + 8


def test_parameters_on_the_same_memory_are_shared_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    (layer,) = take_inventory(model).layers
    assert (layer.name, layer.aliases) == ("0", ("1",))
    model[1].weight = nn.Parameter(model[0].weight.data[:2])
    with pytest.raises(NothingToQuantize, match=r"shares memory with 1\.weight in another shape"):
        take_inventory(model)


def test_embeddings_and_head_are_left_out_unless_included():
    inventory = take_inventory(Tied())
    assert [layer.name for layer in inventory.layers] == ["body"]
    assert by_name(inventory.excluded)["embed"].reason == (
        "embedding (shared with lm_head): left out by default; include it by pattern"
    )
    assert by_name(inventory.excluded)["embed"].aliases == ("lm_head",)
    both = take_inventory(Tied(), include=["embed"], exclude=["lm_*"])
    assert by_name(both.excluded)["embed"].reason == "matches the exclude pattern 'lm_*'"


def test_a_pattern_that_matches_nothing_is_refused():
    for field in ("include", "exclude"):
        with pytest.raises(PatternError, match="Got 'lm_haed'"):
            take_inventory(Tied(), **{field: ["lm_haed"]})


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 8))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_has_no_layer_is_listed_with_its_reason():
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "experts": Experts(),
            "mha": nn.MultiheadAttention(8, 2),
            "rnn": nn.LSTM(3, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "old": nn.Linear(4, 4),
            "empty": nn.Linear(0, 4),
            "complex": nn.Linear(2, 2, dtype=torch.complex64),
            "lazy": nn.LazyLinear(4),
        }
    )
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["old"])
    inventory = take_inventory(model)
    reasons = {item.name: item.reason for item in inventory.excluded}
    assert [layer.name for layer in inventory.layers] == ["fc", "mha.out_proj"]
    assert (
        reasons["experts.gate_up_proj"]
        == "fused expert tensor whose layout is not certain: this version does not offer it"
    )
    assert "nn.MultiheadAttention" in reasons["mha.in_proj_weight"]
    assert "LSTM" in reasons["rnn.weight_ih_l0"]
    assert "parametrized" in reasons["normed.parametrizations.weight.original1"]
    assert "parametrized" in reasons["old.weight_v"]
    assert reasons["empty"] == "it is empty"
    assert "complex64" in reasons["complex"]
    assert "first forward" in reasons["lazy"]


def test_models_on_meta_can_be_listed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    assert [layer.parameters for layer in take_inventory(model).layers] == [32, 32]


def quantized(change):
    model = nn.Sequential(nn.Linear(4, 4))
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "config", type("C", (), {"quantization_config": {}})()), "quantization_config"),
        (
            lambda m: m.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32)),
            "'qweight' is stored as",
        ),
        (lambda m: m.to(torch.float8_e4m3fn), "stored as float8_e4m3fn"),
        (
            lambda m: m.add_module(
                "x", type("Linear4bit", (nn.Module,), {"__module__": "bitsandbytes.nn"})()
            ),
            "is a Linear4bit of bitsandbytes",
        ),
    ],
)
def test_quantized_models_are_refused_with_the_reason(change, message):
    with pytest.raises(AlreadyQuantized, match=message):
        take_inventory(quantized(change))


def test_integer_buffers_are_no_sign_of_quantization():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("position_ids", torch.zeros(1, 9, dtype=torch.long))
    assert len(take_inventory(model).layers) == 1


@pytest.mark.parametrize(
    ("model", "exclude", "message"),
    [
        (nn.Sequential(nn.LayerNorm(4)), (), "it has no weight matrices"),
        (nn.Sequential(nn.Linear(4, 4)), ("*",), r"0: matches the exclude pattern '\*'"),
        (nn.Linear(4, 4), (), "wrap it in nn.Sequential"),
    ],
)
def test_nothing_to_quantize_says_why(model, exclude, message):
    with pytest.raises(NothingToQuantize, match=message):
        take_inventory(model, exclude=exclude)


@pytest.mark.parametrize(
    ("name", "roles", "heads"),
    [
        ("llama", {"self_attention": 8, "feed_forward": 6}, ["lm_head"]),
        ("bert", {"self_attention": 8, "feed_forward": 4, "other": 1}, []),
        ("resnet", None, ["classifier.1"]),
    ],
)
def test_transformers_models(tiny, name, roles, heads):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    kinds = {"llama": AutoModelForCausalLM, "bert": AutoModel, "resnet": AutoModelForImageClassification}
    inventory = take_inventory(kinds[name].from_pretrained(tiny(name).folder))
    found = [layer.role for layer in inventory.layers]
    if roles is None:
        assert set(found) == {"convolution"}
    else:
        assert {role: found.count(role) for role in found} == roles
    left_out = [item.name for item in inventory.excluded if item.reason.startswith("output head")]
    assert left_out == heads
    assert all("out by default" in item.reason for item in inventory.excluded)


@pytest.mark.parametrize(("attribute", "head"), [("fc", True), ("head", True), ("fc2", False)])
def test_plain_models_have_a_head_by_name_only(attribute, head):
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(4, 4))
    model.add_module(attribute, nn.Linear(4, 2))
    names = [layer.name for layer in take_inventory(model).layers]
    assert (attribute not in names) == head
