"""Small models whose sides every group size of 32 divides, saved as folders, and plans for them."""

import random

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from quant.checkpoints.source import Source
from quant.inventory import take_inventory
from tests.deployments import alike, deployment_of

SIDES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llama():
    config = LlamaConfig(
        vocab_size=64, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, **SIDES
    )
    return LlamaForCausalLM(config)


def _bert():
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.3, **SIDES))


BUILDERS = {"llama": _llama, "bert": _bert}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved("llama" | "bert", dtype): a folder, built on first use."""
    built = {}

    def save(name, dtype=torch.float32, **options):
        key = (name, dtype, *options.items())
        if key not in built:
            torch.manual_seed(1)
            built[key] = tmp_path_factory.mktemp(name)
            BUILDERS[name]().to(dtype).save_pretrained(built[key], **options)
        return built[key]

    return save


@pytest.fixture
def deployed():
    """deployed(folder, model, menu, seed, kept): source and deployment of a random plan, fused siblings alike.

    With None in the menu, sets of layers may keep their precision.
    """

    def build(folder, model, menu, seed=0):
        chance, source, every = random.Random(seed), Source.open(folder), take_inventory(model)
        schemes = alike([layer.name for layer in every.layers], lambda: chance.choice(menu))
        kept = [name for name, scheme in schemes.items() if scheme is None]
        inventory = take_inventory(model, exclude=kept)
        planned = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        return source, deployment_of(source, inventory, planned, every), inventory

    return build
