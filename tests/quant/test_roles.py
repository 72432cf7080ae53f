import pytest
from torch import nn

from quant.inventory import take_inventory
from quant.roles import role_of


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "self_attention"),
        ("decoder.layers.0.encoder_attn.k_proj", "self_attention"),
        ("transformer_blocks.0.attn1.to_out.0", "self_attention"),
        ("model.layers.0.mlp.shared_expert.up_proj", "feed_forward"),
        ("model.layers.0.mlp.experts.3.up_proj", "expert"),
        ("transformer_blocks.0.ff.net.0.proj", "feed_forward"),
        ("time_embedding.linear_1", "embedding"),
        ("down_blocks.0.resnets.1.time_emb_proj", "embedding"),
        ("blocks.0.norm1.emb.timestep_embedder.linear_1", "embedding"),
        ("transformer_blocks.0.norm1.linear", "other"),
        ("member.weighting", "other"),
    ],
)
def test_names_tell_roles_where_the_place_tells_nothing(name, role):
    assert role_of(name, "linear") == role


def test_the_place_goes_before_the_name():
    assert role_of("mlp.gate", "linear", router=True) == "router"
    assert role_of("mlp.up_proj", "linear", head=True) == "head"
    assert role_of("mlp.up_proj", "linear", cross=True) == "cross_attention"
    assert role_of("attn.conv", "conv2d", cross=True) == "convolution"
    assert role_of("lm_head", "embedding", head=True) == "embedding"


class Attention(nn.Module):
    def __init__(self, keys, crosses=None):
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(4, 4), nn.Linear(keys, 4), nn.Linear(4, 4)
        if crosses is not None:
            self.is_cross_attention = crosses


@pytest.mark.parametrize(
    ("path", "attention", "role"),
    [
        ("attn", Attention(4), "self_attention"),
        ("attn", Attention(6), "cross_attention"),
        ("attn", Attention(4, crosses=True), "cross_attention"),
        ("attn2", Attention(4), "cross_attention"),
        ("encoder_attn", Attention(4), "cross_attention"),
        ("attn2", Attention(4, crosses=False), "self_attention"),
    ],
)
def test_cross_attention_is_told_by_itself_its_widths_or_its_name(path, attention, role):
    model = nn.Sequential()
    model.add_module("block", nn.ModuleDict({path: attention}))
    assert {layer.role for layer in take_inventory(model).layers} == {role}


def test_routers_that_take_part_have_their_role(tiny_experts):
    layers = take_inventory(tiny_experts("mixtral"), include=["*.gate"]).layers
    assert {layer.role for layer in layers} == {"self_attention", "router", "expert"}
