"""GPT-QModel wants another torch than ours: its parser runs in an interpreter of its own."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant.export import gptqmodel
from quant.export.front import export, lint

MENU = ["w2-g16", "w3-g32", "w4", "w4-g128-asym", "w5-g64", "w6-asym", "w7", "w8-g128", "w8-asym"]
PACKAGES = ["gptqmodel==7.7.0", "pypcre", "logbar", "threadpoolctl", "device-smi", "tokenicer", "defuser"]
READ = """
import pickle, sys
from quant.export import gptqmodel
cases = pickle.load(open(sys.argv[1], "rb"))
found = [gptqmodel.read_back(files, model) for files, model in cases]
pickle.dump(found, open(sys.argv[2], "wb"))
"""
SIZES = """
import pickle, sys, torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
found = []
for bits, size, symmetric in pickle.load(open(sys.argv[1], "rb")):
    layer = TorchLinear(bits=bits, group_size=size, sym=symmetric, desc_act=False, in_features=128,
        out_features=128, bias=False, pack_dtype=torch.int32, register_buffers=True)
    found.append(sum(buffer.nbytes for buffer in layer.buffers()))
pickle.dump(found, open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """outside(script, value): what a script makes of a value in an interpreter that has GPT-QModel."""
    library = tmp_path_factory.mktemp("gptqmodel")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library)]
    subprocess.run([*pip, *PACKAGES], check=True)
    root = Path(gptqmodel.__file__).parents[2]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(library)))}

    def run(script, value):
        source, target = library / "in.pickle", library / "out.pickle"
        source.write_bytes(pickle.dumps(value))
        subprocess.run([sys.executable, "-c", script, source, target], check=True, env=path)
        return pickle.loads(target.read_bytes())

    return run


def odd(inventory):
    """The inventory with names in which a regular expression finds its own signs."""
    spelled = {"self_attn": "attn(0)", "mlp": "mlp+[a-z]*", "layers.1": "la$yers|x.1"}
    layers = []
    for layer in inventory.layers:
        name = layer.name
        for old, new in spelled.items():
            name = name.replace(f".{old}.", f".{new}.")
        layers.append(replace(layer, name=name))
    return replace(inventory, layers=tuple(layers))


@pytest.fixture
def plans(inventories, random_deployment):
    models = [inventories["llama"], inventories["bert"], odd(inventories["llama"])]
    return [random_deployment(models[seed % 3], MENU, seed) for seed in range(12)]


@pytest.mark.slow
def test_random_plans_read_back_as_planned(plans, outside):
    assert [lint("gptqmodel", found) for found in plans] == [()] * len(plans)
    cases = [(export("gptqmodel", found), found.model) for found in plans]
    assert outside(READ, cases) == [found.expected for found in plans]


@pytest.mark.slow
def test_bytes_are_those_of_its_tensors(inventories, deploy, outside):
    wanted, ours = [], []
    for scheme in MENU:
        layers = tuple(
            item for item in inventories["llama"].layers if item.name.endswith("0.self_attn.o_proj")
        )
        found = deploy(replace(inventories["llama"], layers=layers), {layers[0].name: scheme})
        (facts,) = found.quantized.values()
        wanted.append((facts.bits, facts.group_size or -1, facts.symmetric))
        ours.append(gptqmodel.stored_bytes(found))
    assert outside(SIZES, wanted) == ours


def test_every_rule_matches_one_module(plans):
    for found in plans:
        names = [module.name for module in found.model.modules]
        rules = json.loads(export("gptqmodel", found)["quantize_config.json"])["dynamic"]
        matched = [[name for name in names if re.match(rule[2:], name)] for rule in rules]
        assert all(len(hits) == 1 for hits in matched)
        assert sorted(hits[0] for hits in matched) == sorted(names)
        assert {
            rule[:2] for rule, hits in zip(rules, matched, strict=True) if hits[0] in found.quantized
        } == {"+:"}


@pytest.mark.parametrize(
    ("schemes", "layout"),
    [
        (("w4", "w8"), "gptq"),
        (("w4", "w8-asym"), "gptq_v2"),
        (("w4-asym", "w5"), "gptq_p"),
    ],
)
def test_the_layout_follows_from_the_schemes(schemes, layout, inventories, deploy):
    layers = [layer.name for layer in inventories["llama"].layers]
    assignment = {name: schemes[name.startswith("model.layers.2.")] for name in layers}
    config = json.loads(export("gptqmodel", deploy(inventories["llama"], assignment))["quantize_config.json"])
    assert config["checkpoint_format"] == config["format"] == layout


def test_sides_must_fill_whole_words(inventories, deploy):
    layer = replace(inventories["llama"].layers[0], weight_shape=(40, 128), matrix=(40, 128), parameters=5120)
    violations = lint("gptqmodel", deploy(replace(inventories["llama"], layers=(layer,)), {layer.name: "w4"}))
    assert [item.got for item in violations if "multiples of 32" in item.rule] == ["40 x 128"]
