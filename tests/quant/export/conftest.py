"""Models of three kinds with sides that every group size divides, and random plans for them."""

import random

import pytest

from quant.export.protocol import Deployment, ModelFacts
from quant.layers import Excluded, Inventory, Layer
from quant.ops import matrix_shape
from tests.deployments import alike, plan_of

CONFIG = {"model_type": "test", "architectures": ["Test"]}


def _layer(name, shape, op="linear", aliases=()):
    size = 1
    for side in shape:
        size *= side
    return Layer(name, op, shape, matrix_shape(shape, op), size, None, "other", aliases, "float32")


def _llama():
    layers = []
    for block in range(3):
        base = f"model.layers.{block}"
        layers += [_layer(f"{base}.self_attn.{part}_proj", (128, 128)) for part in "qkvo"]
        layers += [_layer(f"{base}.mlp.{part}_proj", (256, 128)) for part in ("gate", "up")]
        layers.append(_layer(f"{base}.mlp.down_proj", (128, 256)))
    kept = (
        Excluded("model.embed_tokens", "embedding", 640, "left out"),
        Excluded("lm_head", "linear", 640, "head"),
    )
    return Inventory(tuple(layers), kept, 10**6, 1000)


def _bert():
    layers = []
    for block in range(11):
        base = f"encoder.layer.{block}"
        layers += [_layer(f"{base}.attention.self.{part}", (128, 128)) for part in ("query", "key", "value")]
        layers += [
            _layer(f"{base}.attention.output.dense", (128, 128)),
            _layer(f"{base}.output.dense", (128, 384)),
        ]
    kept = (Excluded("embeddings.word_embeddings", "embedding", 640, "left out"),)
    return Inventory(tuple(layers), kept, 10**7, 1000)


def _cnn():
    layers = (
        _layer("stem", (8, 1, 3, 3), "conv2d"),
        _layer("block.conv", (16, 8, 3, 3), "conv2d"),
        _layer("head", (128, 128)),
    )
    return Inventory(layers, (), 10**5, 1000)


INVENTORIES = {"llama": _llama(), "bert": _bert(), "cnn": _cnn()}


@pytest.fixture(params=["llama", "bert"])
def language_model(request):
    """The inventory of a Llama-type or BERT-type model."""
    return INVENTORIES[request.param]


@pytest.fixture
def inventories():
    return INVENTORIES


@pytest.fixture
def deploy():
    """deploy(inventory, {layer: scheme}, kept=(names,)): a deployment; kept layers are not in the plan."""

    def build(inventory, assignment, kept=()):
        part = tuple(layer for layer in inventory.layers if layer.name not in kept)
        planned = Inventory(part, inventory.excluded, inventory.total_parameters, inventory.other_bytes)
        plan = plan_of(planned, assignment, model="a" * 64, scores="b" * 64)
        return Deployment(plan, ModelFacts.of(inventory, CONFIG))

    return build


@pytest.fixture
def random_deployment(deploy):
    """random_deployment(inventory, menu, seed): any scheme anywhere, fused siblings alike, some kept."""

    def build(inventory, menu, seed):
        chance = random.Random(seed)
        names = [layer.name for layer in inventory.layers]
        chosen = alike(names, lambda: chance.choice([*menu, None]))
        if not any(chosen.values()):
            chosen = dict.fromkeys(names, menu[0])
        kept = [name for name, scheme in chosen.items() if scheme is None]
        return deploy(inventory, {name: chosen[name] for name in names if name not in kept}, kept)

    return build
