"""What every exporter must do, checked for every entry of EXPORTERS."""

import json
import subprocess
import sys

import pytest

from quant.activations import ACTIVATIONS
from quant.catalog import CHECKPOINTS, EXPORTERS
from quant.checkpoints import front as checkpoints
from quant.export.front import PROVENANCE_FILE, export, lint
from quant.export.protocol import Deployment, ExportRefused, ModelFacts
from quant.formats import FORMATS
from quant.layers import Excluded, Inventory, Layer
from quant.plan import Certificate, Digests
from quant.planning import build_plan
from quant.runtime_rules import target_of
from quant.runtimes import RUNTIMES
from quant.schemes import Scheme, parse_scheme

NAMES = tuple(f"model.layers.{n}.mlp.down_proj" for n in (0, 1, 10))
CANDIDATES = ("w4-g64-asym", "w4-g64", "w4", "w8", "q8_0")


def deployment(scheme):
    layers = tuple(
        Layer(name, "linear", (64, 128), (64, 128), 8192, None, "other", (), "float32") for name in NAMES
    )
    inventory = Inventory(layers, (Excluded("lm_head", "linear", 64, "head"),), 10**5, 1000)
    plan = build_plan(
        inventory,
        {layer.name: scheme for layer in layers},
        digests=Digests(model="a" * 64),
        certificate=Certificate("feasible"),
        source="test",
    )
    return Deployment(plan, ModelFacts.of(inventory, {"model_type": "llama", "num_hidden_layers": 11}))


def accepted(name):
    for scheme in CANDIDATES:
        found = deployment(scheme)
        if not EXPORTERS[name].load().lint(found):
            return found
    raise AssertionError(f"{name} takes none of {CANDIDATES}")


@pytest.mark.parametrize("name", EXPORTERS)
def test_entry_is_complete(name):
    entry = EXPORTERS[name]
    module = entry.load()
    assert entry.name == name
    assert entry.library
    assert entry.summary
    assert entry.source
    assert all(callable(getattr(module, verb)) for verb in ("lint", "files", "stored_bytes", "read_back"))


@pytest.mark.parametrize("name", [name for name, entry in EXPORTERS.items() if not entry.separate])
def test_round_trip_names_every_module(name):
    found = accepted(name)
    assert EXPORTERS[name].load().read_back(export(name, found), found.model) == found.expected


@pytest.mark.parametrize("name", EXPORTERS)
def test_equal_plans_give_equal_bytes_with_provenance(name):
    found = accepted(name)
    files = export(name, found)
    assert files == export(name, found)
    provenance = json.loads(files[PROVENANCE_FILE])
    assert provenance["plan"] == found.plan.digest
    assert provenance["model"] == "a" * 64
    assert provenance["consumer_bytes"] == EXPORTERS[name].load().stored_bytes(found) > 0


@pytest.mark.parametrize("name", EXPORTERS)
def test_refusals_name_layer_and_rule(name):
    message = r"Plan must be one that .* can run\. model\.layers\.0\.mlp\.down_proj: .*Got w4-tensor"
    with pytest.raises(ExportRefused, match=message) as caught:
        export(name, deployment("w4-tensor"))
    assert {item.layer for item in caught.value.violations} == set(NAMES)


def test_writing_needs_neither_torch_nor_a_consumers_library():
    libraries = sorted({"torch", *(entry.library for entry in EXPORTERS.values())})
    code = (
        "import sys; from quant.catalog import EXPORTERS; import quant.export.front;"
        " [entry.load() for entry in EXPORTERS.values()];"
        f" sys.exit(bool(set({libraries!r}) & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_quantizer_that_stores_more_than_the_format_is_refused(name):
    found = accepted(name)
    scheme = next(scheme for name, scheme in found.schemes.items() if name in found.quantized)
    refused = deployment(f"{scheme.name}-lorc4")
    with pytest.raises(ExportRefused, match=r"down_proj: the format's tensors must be all that is stored"):
        export(name, refused)


def menu():
    """Every example format, and what activations can be had with the usual ones."""
    schemes = [
        Scheme(fmt) for family in FORMATS.values() for fmt in family.examples if family.name != "plain"
    ]
    with_inputs = ("w4", "w8", "w4-g128", "fp8", "fp8-tensor", "nvfp4", "mxfp4", "mxfp8")
    schemes += [parse_scheme(f"{name}-a{inputs}") for name in with_inputs for inputs in ACTIVATIONS]
    return [scheme for scheme in schemes if scheme.weight.refuses((256, 512)) is None]


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name in RUNTIMES])
def test_what_a_runtime_offers_can_be_exported_to_it(name):
    """A plan that was solved for a runtime can be exported to it, or written for it as a checkpoint."""
    layer = Layer(
        "model.layers.0.mlp.down_proj", "linear", (256, 512), (256, 512), 131072, None, "other", (), "float32"
    )
    inventory = Inventory((layer,), (), 10**6, 1000)
    config = {"model_type": "llama", "num_hidden_layers": 1}
    offered = [scheme for scheme in menu() if RUNTIMES[name].refuses(target_of(layer), scheme) is None]
    assert offered
    refused = {}
    for scheme in offered:
        plan = build_plan(
            inventory,
            {layer.name: scheme},
            digests=Digests(),
            certificate=Certificate("feasible"),
            source="test",
            runtime=name,
        )
        deployment = Deployment(plan, ModelFacts.of(inventory, config))
        violations = lint(name, deployment)
        if violations and (name not in CHECKPOINTS or checkpoints.lint(name, deployment)):
            refused[scheme.name] = violations[0].rule
    assert refused == {}
