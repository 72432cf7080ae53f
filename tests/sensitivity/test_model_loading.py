from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.inventory import take_inventory
from sensitivity.errors import BadModel, ModelAlreadyQuantized, NonFiniteWeights, SessionError
from sensitivity.model_loading import LoadedModel, load_model, load_skeleton
from sensitivity.spec import ModelSource


def load(location: str | Path, task: str = "auto", kind: Any = "folder") -> LoadedModel:
    return load_model(ModelSource(kind, str(location), "d"), task, torch.device("cpu"))


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(tiny(name).folder, tmp_path / name))

    return copied


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "task", "class_name"),
    [
        ("llama", "causal_lm", "LlamaForCausalLM"),
        ("bert", "sequence_embedding", "BertModel"),
        ("resnet", "image_classification", "ResNetForImageClassification"),
    ],
)
def test_the_architecture_decides_class_and_task(tiny: Any, name: str, task: str, class_name: str) -> None:
    loaded = load(tiny(name).folder)
    assert (loaded.task, type(loaded.model).__name__) == (task, class_name)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    for key, stored in load_file(tiny(name).folder / "model.safetensors").items():
        assert torch.equal(loaded.model.state_dict()[key], stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_precision_is_kept(copy: Any, dtype: torch.dtype) -> None:
    folder = copy("resnet")
    edit_weights(
        folder, lambda w: w.update({k: v.to(dtype) if v.is_floating_point() else v for k, v in w.items()})
    )
    edit_config(folder, dtype=str(dtype).removeprefix("torch."))
    loaded = load(folder)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}


def test_missing_tensors_are_named(copy: Any) -> None:
    folder = copy("llama")
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        BadModel, match=r"must be in the folder's weights. Got model.layers.1.mlp.up_proj.weight"
    ):
        load(folder)


def test_more_layers_than_weights_is_an_error(copy: Any) -> None:
    folder = copy("llama")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(BadModel, match=r"must be in the folder's weights. Got model.layers.2.* and 4 more"):
        load(folder)


@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_a_skeleton_has_the_layers_of_the_model_and_no_weights(tiny: Any, name: str) -> None:
    folder = tiny(name).folder
    skeleton = load_skeleton(folder)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    found, expected = take_inventory(skeleton), take_inventory(load(folder).model)
    assert (found.layers, found.excluded) == (expected.layers, expected.excluded)


def test_a_skeleton_of_a_folder_without_all_weights_is_refused(copy: Any) -> None:
    folder = copy("llama")
    edit_weights(folder, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(BadModel, match=r"Got lm_head\.weight"):
        load_skeleton(folder)


def test_unexpected_tensors_are_named(copy: Any) -> None:
    folder = copy("llama")
    edit_weights(folder, lambda w: w.update({"model.layers.9.adapter": torch.zeros(2)}))
    with pytest.raises(BadModel, match=r"known to the model's configuration. Got model.layers.9.adapter"):
        load(folder)


def test_mismatched_tensors_are_named(copy: Any) -> None:
    folder = copy("llama")
    edit_config(folder, intermediate_size=20)
    with pytest.raises(
        BadModel, match=r"the shape that config.json says. Got model.layers.0.mlp.down_proj.weight"
    ):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copy: Any, bad: float) -> None:
    folder = copy("llama")
    edit_weights(folder, lambda w: w["model.layers.0.mlp.up_proj.weight"].view(-1)[3:4].fill_(bad))
    with pytest.raises(NonFiniteWeights, match=r"Got NaN or infinity in 'model.layers.0.mlp.up_proj.weight'"):
        load(folder)


def test_quantized_models_are_refused(copy: Any) -> None:
    folder = copy("llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelAlreadyQuantized, match="Got a quantization_config: send the original"):
        load(folder)


def test_integer_weights_are_refused(copy: Any) -> None:
    folder = copy("resnet")
    name = "classifier.1.weight"
    edit_weights(folder, lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(ModelAlreadyQuantized, match=r"Got I8 in 'classifier.1.weight': send the original"):
        load(folder)


def test_remote_code_is_refused(copy: Any) -> None:
    folder = copy("llama")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(BadModel, match="remote code, which is never run"):
        load(folder)


def test_pickled_weights_are_never_read(copy: Any) -> None:
    folder = copy("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModel, match=r"must hold safetensors weights. Got only pytorch_model.bin"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "config.json must be JSON"), ('{"model_type": "no-such-model"}', "config.json must describe")],
)
def test_bad_configurations(copy: Any, content: str, words: str) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text(content)
    with pytest.raises(BadModel, match=words):
        load(folder)


def test_broken_weight_files(copy: Any) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(BadModel, match=r"model.safetensors must be a safetensors file"):
        load(folder)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"must hold config.json"):
        load(tmp_path)
    with pytest.raises(BadModel, match="must be a folder"):
        load(tmp_path / "nowhere")


def test_a_factory_returns_the_model(tiny: Any) -> None:
    loaded = load(tiny("mlp").location, kind="factory")
    assert isinstance(loaded.model, nn.Sequential)
    assert loaded.task == "generic"
    assert load(tiny("mlp").location, "image_classification", kind="factory").task == "image_classification"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("tiny_factory", "must be package.module:function. Got 'tiny_factory'"),
        ("no_such_module:build", "factory module 'no_such_module' must import. Got ModuleNotFoundError"),
        ("tiny_factory:nothing", "must hold a function 'nothing'"),
        ("tiny_factory:not_a_model", "must return an nn.Module. Got int"),
        ("tiny_factory:fails", "must work without arguments. Got KeyError"),
    ],
)
def test_bad_factories(tiny: Any, location: str, words: str) -> None:
    tiny("mlp")
    with pytest.raises(SessionError, match=words):
        load(location, kind="factory")
