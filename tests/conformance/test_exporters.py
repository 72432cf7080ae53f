"""What every exporter must do, checked for every entry of EXPORTERS."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.activations import ACTIVATIONS
from quant.catalog import CHECKPOINTS, EXPORTERS
from quant.checkpoints import front as checkpoints
from quant.export.front import PROVENANCE_FILE, export, lint
from quant.export.protocol import Deployment, ExportRefused, ModelFacts
from quant.formats import FORMATS
from quant.kv_cache import SMALLER_TYPES
from quant.layers import Excluded, Inventory, Layer
from quant.plan import Certificate, Digests
from quant.planning import build_plan
from quant.runtime_rules import target_of
from quant.runtimes import RUNTIMES
from quant.schemes import Scheme, parse_scheme

NAMES = tuple(f"model.layers.{n}.mlp.down_proj" for n in (0, 1, 10))
CANDIDATES = ("w4-g64-asym", "w4-g64", "w4", "w8", "q8_0")


def deployment(*schemes):
    """One scheme for all of NAMES, or one for each."""
    layers = tuple(
        Layer(name, "linear", (64, 256), (64, 256), 16384, None, "other", (), "float32") for name in NAMES
    )
    inventory = Inventory(layers, (Excluded("lm_head", "linear", 64, "head"),), 10**5, 1000)
    plan = build_plan(
        inventory,
        dict(zip(NAMES, schemes * (len(NAMES) // len(schemes)), strict=True)),
        digests=Digests(model="a" * 64),
        certificate=Certificate("feasible"),
        source="test",
    )
    return Deployment(plan, ModelFacts.of(inventory, {"model_type": "llama", "num_hidden_layers": 11}))


def with_caches(found, *kinds):
    caches = {f"model.layers.{n}.self_attn": kind for n, kind in enumerate(kinds)}
    return replace(found, plan=replace(found.plan, kv_cache=caches))


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


@pytest.mark.parametrize("name", EXPORTERS)
def test_caches_are_asked_for_or_refused(name):
    """One setting for all attention layers, where the consumer's files have one; full caches need none."""
    found = accepted(name)
    plain = {file: text for file, text in export(name, found).items() if file != PROVENANCE_FILE}
    full = export(name, with_caches(found, "full", "full"))
    assert {file: text for file, text in full.items() if file != PROVENANCE_FILE} == plain
    entry = EXPORTERS[name]
    for kind in SMALLER_TYPES:
        if kind in (*entry.caches, *entry.cache_switches):
            files = export(name, with_caches(found, kind, kind))
            assert any(files[file] != text for file, text in plain.items()) == (kind in entry.caches)
            switches = json.loads(files[PROVENANCE_FILE]).get("switches")
            assert switches == entry.cache_switches.get(kind)
            continue
        with pytest.raises(ExportRefused, match=rf"layers\.0\.self_attn: key-value caches must.*Got {kind}"):
            export(name, with_caches(found, kind, kind))
    kind = (*entry.caches, "int8")[0]
    with pytest.raises(ExportRefused, match=r"layers\.1\.self_attn: key-value caches must"):
        export(name, with_caches(found, "full", kind))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_refuse_caches_that_their_consumer_cannot_be_told_of(name):
    """Our own readers keep weights apart from caches: plan and provenance hold these."""
    found = with_caches(accepted("torchao" if name == "torchao" else "vllm"), "int4", "full")
    refused = {item.layer for item in checkpoints.lint(name, found) if "cache" in item.rule}
    expected = set() if name.startswith("pytorch") else {f"model.layers.{n}.self_attn" for n in (0, 1)}
    assert refused == expected


def test_caches_read_back_by_the_consumers_libraries():
    from compressed_tensors.quantization import QuantizationConfig

    from quant.export.modelopt import _converter

    found = with_caches(accepted("vllm"), "fp8_e4m3", "fp8_e4m3")
    config = json.loads(export("vllm", found)["config.json"])["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert (scheme.num_bits, str(scheme.type), str(scheme.strategy)) == (8, "float", "tensor")
    assert (scheme.symmetric, scheme.dynamic) == (True, False)
    assert EXPORTERS["vllm"].load().read_back(export("vllm", found), found.model) == found.expected
    found = with_caches(accepted("modelopt"), "fp8_e4m3", "fp8_e4m3")
    converted = _converter()(json.loads(export("modelopt", found)["hf_quant_config.json"]))
    assert converted["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def menu():
    """Every example format, and what activations can be had with the usual ones."""
    schemes = [
        Scheme(fmt) for family in FORMATS.values() for fmt in family.examples if family.name != "plain"
    ]
    with_inputs = ("w4", "w8", "w4-g128", "fp8", "fp8-tensor", "nvfp4", "mxfp4", "mxfp8")
    schemes += [parse_scheme(f"{name}-a{inputs}") for name in with_inputs for inputs in ACTIVATIONS]
    return [scheme for scheme in schemes if scheme.weight.refuses((256, 512)) is None]


@pytest.fixture(scope="module")
def sorted_menu():
    """sorted_menu(consumer): schemes of the menu that it takes for a whole plan, and those that it refuses."""

    @cache
    def split(name):
        taken, refused = [], []
        for scheme in menu():
            (refused if EXPORTERS[name].load().lint(deployment(scheme)) else taken).append(scheme)
        return taken, refused

    return split


@pytest.mark.parametrize("name", EXPORTERS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_plans_read_back_module_by_module_and_each_violation_is_explained(name, data, sorted_menu):
    taken, refused = sorted_menu(name)
    fine = {layer: data.draw(st.sampled_from(taken)) for layer in NAMES}
    good = deployment(*fine.values())
    assert lint(name, good) == ()
    if not EXPORTERS[name].separate:
        assert EXPORTERS[name].load().read_back(export(name, good), good.model) == good.expected
    broken = data.draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(refused), min_size=1))
    violations = lint(name, deployment(*(fine | broken).values()))
    assert {item.layer for item in violations} == set(broken)
    assert all(item.rule and broken[item.layer].name in item.got for item in violations)


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
    caches = [(offered[0], kind) for kind in RUNTIMES[name].smaller_caches]
    refused = {}
    for scheme, kind in [*((scheme, None) for scheme in offered), *caches]:
        plan = build_plan(
            inventory,
            {layer.name: scheme},
            digests=Digests(),
            certificate=Certificate("feasible"),
            source="test",
            runtime=name,
            kv_cache=None if kind is None else {"model.layers.0.self_attn": kind},
        )
        deployment = Deployment(plan, ModelFacts.of(inventory, config))
        violations = lint(name, deployment)
        if violations and (name not in CHECKPOINTS or checkpoints.lint(name, deployment)):
            refused[scheme.name, kind] = violations[0].rule
    assert refused == {}
