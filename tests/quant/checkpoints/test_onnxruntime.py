"""ONNX models with MatMulNBits nodes: what ONNX Runtime computes, and what lies in the files."""

import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from quant.apply import fake_quantized, quantized_weight
from quant.checkpoints import front, onnx_graph
from quant.checkpoints import onnxruntime as onnx_consumer
from quant.checkpoints.onnx_model import MODULE_KEY, lay_out, node_values
from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import Source
from quant.export.onnxruntime import node_facts
from quant.export.protocol import ExportRefused
from quant.inventory import take_inventory
from quant.layers import Inventory
from quant.packing import decode
from quant.quantizers.rtn import quantize
from quant.schemes import parse_scheme
from tests.deployments import deployment_of

MENU = ("w2-g16", "w2-g16-asym", "w4-g16", "w4-g16-asym", "w8-g16", "w8-g16-asym-float32", "w4-g16-rtn")
CLASSES = {"llama": "LlamaForCausalLM", "bert": "BertModel", "resnet": "ResNetForImageClassification"}
QUICK = [name if name != "bert" else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
"""A trace takes seconds."""
HEADS = {"resnet": ("classifier.1",)}


class Case:
    """A tiny model in a folder, its inventory, and random plans for its linear layers."""

    def __init__(self, name, folder):
        self.source = Source.open(folder)
        self.model = (
            getattr(transformers, CLASSES.get(name, "GPT2LMHeadModel")).from_pretrained(folder).eval()
        )
        found = take_inventory(self.model, include=HEADS.get(name, ()))
        linear = tuple(layer for layer in found.layers if layer.op in ("linear", "transformers_conv1d"))
        self.every = found
        self.inventory = Inventory(linear, found.excluded, found.total_parameters, found.other_bytes)

    def deploy(self, assignment, every=None):
        found = every or self.every
        layers = tuple(layer for layer in found.layers if layer.name in assignment)
        return deployment_of(self.source, replace(found, layers=layers), assignment, found)

    def random(self, seed):
        chance = random.Random(seed)
        chosen = {layer.name: chance.choice([*MENU, None]) for layer in self.inventory.layers}
        chosen[self.inventory.layers[0].name] = MENU[seed % len(MENU)]
        return self.deploy({name: scheme for name, scheme in chosen.items() if scheme})


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A folder with a CNN whose head has 16 columns, the smallest block."""
    folder = tmp_path_factory.mktemp("resnet16")
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    torch.manual_seed(5)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(tiny, resnet):
    """case(name): built once, so that its graph is traced once."""
    cases = {}

    def find(name):
        if name not in cases:
            cases[name] = Case(name, resnet if name == "resnet" else tiny(name).folder)
        return cases[name]

    return find


def write(case, deployment, out):
    layout = front.write("onnxruntime", case.source, deployment, out).layout
    return layout, onnx.load(out / "model.onnx")


def modules_of(model, facts):
    """What the file says of every module."""
    nodes = {
        prop.value: node
        for node in model.graph.node
        for prop in node.metadata_props
        if prop.key == MODULE_KEY
    }
    return {module.name: node_facts(nodes.get(module.name)) for module in facts.modules}


def answer(out, feed):
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


def feeds(name):
    generator = torch.Generator().manual_seed(3)
    if name == "resnet":
        return [
            {"pixel_values": torch.randn(b, 1, side, 16, generator=generator)}
            for b, side in ((1, 16), (3, 40))
        ]
    found = []
    for batch, length in ((1, 5), (3, 12), (2, 1)):
        tokens = torch.randint(0, 40, (batch, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, length // 2 + 1 :] = 0
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found


@pytest.mark.parametrize("name", QUICK)
def test_onnxruntime_computes_what_was_measured(name, case, tmp_path):
    found = case(name)
    deployment = found.random(1)
    write(found, deployment, tmp_path / "out")
    for feed in feeds(name):
        with fake_quantized(found.model, deployment.plan, found.inventory), torch.no_grad():
            expected = found.model(**feed)[0]
        result = answer(tmp_path / "out", feed)
        seen = feed["attention_mask"].bool() if name == "llama" else slice(None)
        assert torch.allclose(
            result[seen], expected[seen], rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("seed", range(5))
def test_random_plans_read_back_as_planned(name, seed, case, tmp_path):
    found = case(name)
    deployment = found.random(seed)
    layout, model = write(found, deployment, tmp_path / "out")
    assert modules_of(model, deployment.model) == deployment.expected
    nodes = {node.metadata_props[0].value: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    sizes = {item.name: len(item.raw_data) for item in model.graph.initializer}
    stored = [name for node in nodes.values() for name in node.input[1:4] if name in sizes]
    assert layout.planned_bytes == sum(sizes[name] for name in stored)
    for path, weight in onnx_consumer.read_back(tmp_path / "out", deployment):
        own, layer = found.model.get_submodule(path).weight, found.inventory.by_name[path]
        assert torch.equal(weight, quantized_weight(own, layer, deployment.schemes[path])), path


def test_nodes_are_named_by_module(case):
    found = case("llama")
    path = found.inventory.layers[0].name
    model = onnx.load_from_string(lay_out(found.source, found.deploy({path: "w4-g16"})).proto)
    names = {prop.value: node.name for node in model.graph.node for prop in node.metadata_props}
    assert names[path] == "/model/layers.0/self_attn/q_proj/MatMul_Q4"
    assert names["lm_head"] == "/lm_head/MatMul"
    assert [value.name for value in model.graph.output] == ["logits"]


@pytest.mark.slow
def test_another_trace_gives_the_same_graph(case):
    folder = case("resnet").source.folder
    assert onnx_graph._trace.__wrapped__((folder / "config.json").read_text()) == onnx_graph.trace(folder)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", ["sym", "asym"])
def test_the_operator_reads_what_is_packed(bits, size, sign):
    rows, columns = 24, 200 if size <= 128 else 264
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    encoded = quantize(weight, parse_scheme(f"w{bits}-g{size}-{sign}").weight)
    names = ["values", "scales", "points"]
    blocks = encoded.values.shape[1]
    shapes = [(rows, blocks, -1), (rows, blocks), (rows, -1)]
    tensors = [
        tensor.reshape(shape).numpy() for tensor, shape in zip(node_values(encoded), shapes, strict=False)
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", *names[: len(tensors)]], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=size,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", 1, ["n", columns])],
        [helper.make_tensor_value_info("y", 1, ["n", rows])],
        [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors, names, strict=False)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = torch.eye(columns)
    found = session.run(None, {"x": inputs.numpy()})[0]
    assert np.allclose(found, decode(encoded).T.numpy(), rtol=1e-5, atol=1e-6)


def test_a_16_bit_model_becomes_a_32_bit_one(resnet, tmp_path):
    folder = shutil.copytree(resnet, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    halves = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()
    }
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    found = Case("resnet", folder)
    deployment = found.deploy({"classifier.1": "w8-g16"})
    write(found, deployment, tmp_path / "out")
    (weight,) = [weight for _, weight in onnx_consumer.read_back(tmp_path / "out", deployment)]
    assert torch.equal(
        weight, quantized_weight(halves["classifier.1.weight"].float(), found.inventory.layers[0], "w8-g16")
    )
    feed = feeds("resnet")[0]
    with fake_quantized(found.model.float(), deployment.plan, found.inventory), torch.no_grad():
        assert torch.allclose(answer(tmp_path / "out", feed), found.model(**feed).logits, atol=1e-4)


@pytest.mark.slow
def test_weights_stored_the_other_way_round_and_layers_that_keep_their_type(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, n_positions=32)
    config.bos_token_id = config.eos_token_id = 1
    torch.manual_seed(2)
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    found = Case("gpt2", tmp_path / "gpt2")
    names = [layer.name for layer in found.inventory.layers]
    deployment = found.deploy({names[0]: "w8-g32-asym", names[1]: "bf16", names[2]: "w4-g32"})
    _, model = write(found, deployment, tmp_path / "out")
    assert modules_of(model, deployment.model) == deployment.expected
    kept = found.model.get_submodule(names[1]).weight.float()
    assert torch.equal(dict(onnx_consumer.read_back(tmp_path / "out", deployment))[names[1]], kept)
    with fake_quantized(found.model.float(), deployment.plan, found.inventory), torch.no_grad():
        expected = found.model(**feeds("gpt2")[0]).logits
    assert torch.allclose(answer(tmp_path / "out", feeds("gpt2")[0]), expected, atol=1e-4)


def test_convolutions_and_embeddings_are_refused_by_name(case, tmp_path):
    found = case("resnet")
    everything = take_inventory(found.model)
    conv = everything.layers[0].name
    with pytest.raises(
        ExportRefused, match=rf"{conv}: only linear, transformers_conv1d .* Got a conv2d module"
    ):
        write(found, found.deploy({conv: "w4"}, everything), tmp_path / "out")


@pytest.mark.parametrize("scheme", ["w3-g16", "w4", "w4-g8", "w4-tensor", "fp8"])
def test_schemes_without_a_kernel_are_refused(scheme, case, tmp_path):
    found = case("llama")
    path = found.inventory.layers[0].name
    with pytest.raises(ExportRefused, match=rf"{path}: .* Got {scheme}"):
        write(found, found.deploy({path: scheme}), tmp_path / "out")


def test_a_weight_that_the_folder_lacks_is_named(tiny, case, tmp_path):
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.input_layernorm.weight"
    save_file({name: value for name, value in weights.items() if name != gone}, folder / "model.safetensors")
    found = case("llama")
    with pytest.raises(CheckpointError, match=rf"Got none for '{gone}'"):
        front.layout("onnxruntime", Source.open(folder), found.random(0), force=True)


def test_a_module_that_the_forward_pass_never_reads_is_named(case):
    found = case("llama")
    ghost = Inventory((replace(found.inventory.layers[0], name="model.ghost"),), (), 10**5, 0)
    deployment = found.deploy({"model.ghost": "w4-g16"}, ghost)
    with pytest.raises(CheckpointError, match=r"forward pass uses\. Got 'model\.ghost'"):
        lay_out(found.source, deployment)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "nosuch"}', "config.json must describe a model of transformers"),
        ('{"model_type": "llama", "architectures": ["NoSuchModel"]}', "must name a model class"),
        (
            '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16, "num_layers": 1}',
            "torch.onnx.export traces",
        ),
        (
            '{"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}',
            "must take input_ids or pixel_values",
        ),
    ],
)
def test_models_that_cannot_be_traced_are_refused(config, words, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        onnx_graph.trace(tmp_path)
