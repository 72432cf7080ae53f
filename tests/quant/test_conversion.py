from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.conversion import ConversionError, convert

INDEX = "pytorch_model.bin.index.json"


def tensors() -> dict[str, Tensor]:
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    values[0, 0], values[0, 1] = torch.nan, -torch.inf
    return {
        "a.weight": values,
        "a.half": values.half(),
        "b.weight": values.bfloat16(),
        "b.transposed": values.t(),
        "b.row": values.double()[1:3],
        "c.count": torch.tensor(7),
        "c.mask": torch.tensor([True, False]),
        "c.empty": torch.zeros(0, 3),
    }


def same(found: Tensor, expected: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(*flat)


def require_same(folder: Path, expected: dict[str, Tensor], name: str = "model.safetensors") -> None:
    found = load_file(folder / name)
    assert set(found) == set(expected)
    assert all(same(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_value_is_the_same(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(tensors(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    steps: list[tuple[int, int]] = []
    done = convert(tmp_path / name, tmp_path / "out", lambda *step: steps.append(step))
    require_same(tmp_path / "out", tensors())
    size = (tmp_path / name).stat().st_size
    assert steps == [(0, size), (size, size)]
    assert (done.as_json()["tensors"], done.as_json()["has_config"]) == (8, False)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_weights_are_found_beside_the_state_of_a_training(tmp_path: Path, wrapper: str) -> None:
    saved = {"epoch": 3, wrapper: OrderedDict(tensors()), "optimizer": {"step": torch.tensor(1)}}
    torch.save(saved, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "out")
    require_same(tmp_path / "out", tensors())


def test_parameters_become_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2, 2))}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "out")
    require_same(tmp_path / "out", {"w": torch.ones(2, 2)})


def test_shared_tensors_keep_every_name(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    stored = {"embed.weight": weight, "head.weight": weight, "first.row": weight[0], "alone": weight.clone()}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    done = convert(tmp_path, tmp_path / "out")
    require_same(tmp_path / "out", stored)
    assert done.files[0].shared == 2


def shards(folder: Path) -> None:
    values = tensors()
    parts = {letter: {k: v for k, v in values.items() if k.startswith(letter)} for letter in "abc"}
    names = {letter: f"pytorch_model-{n:05}-of-00003.bin" for n, letter in enumerate("abc", 1)}
    for letter, part in parts.items():
        torch.save(part, folder / names[letter])
    weight_map = {key: names[key[0]] for key in values}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_come_with_their_index_and_the_files_beside_them(tmp_path: Path) -> None:
    shards(tmp_path)
    for name in ("config.json", "tokenizer.json", "merges.txt", "README.md", "modeling_mine.py"):
        (tmp_path / name).write_text(name)
    done = convert(tmp_path, tmp_path / "out")
    names = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    copied = ["config.json", "merges.txt", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*names, *copied, "model.safetensors.index.json"]
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {key: load_file(tmp_path / "out" / name)[key] for key, name in index["weight_map"].items()}
    assert all(same(found[key], value) for key, value in tensors().items())
    assert (list(done.copied), [file.name for file in done.files]) == (copied, names)


def test_a_diffusion_model_keeps_its_name(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "diffusion_pytorch_model.bin")
    convert(tmp_path, tmp_path / "out")
    require_same(tmp_path / "out", tensors(), "diffusion_pytorch_model.safetensors")


class Hostile:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_runs(tmp_path: Path, zipped: bool) -> None:
    hostile = {"a": torch.ones(2), "b": Hostile(tmp_path / "ran")}
    torch.save(hostile, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match=r"must hold tensors alone. Got an object .*mkdir") as caught:
        convert(tmp_path / "model.bin", tmp_path / "out")
    assert "save_pretrained" in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin"]


def test_a_whole_module_is_refused_with_what_to_save(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\), file\)"):
        convert(tmp_path / "model.pt", tmp_path / "out")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"program of torch \(TorchScript"):
        convert(tmp_path / "model.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"w": torch.ones(2), "epoch": 3}, "Got int at 'epoch'"),
        ([torch.ones(2)], "Got list without one"),
        ({}, "Got dict without one"),
        ({1: torch.ones(2)}, "Got dict without one"),
        ({"w": torch.eye(3).to_sparse()}, r"Got torch.sparse_coo at 'w'"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "Got torch.complex128 at 'w'"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, saved: Any, words: str) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path / "w.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), b"PK\3\4" + bytes(60)])
def test_what_torch_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(ConversionError, match=r"w.bin must"):
        convert(tmp_path / "w.bin", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.weight": "../pytorch_model-00001-of-00003.bin"}, "its own folder. Got '../pytorch"),
        ({"a.weight": "pytorch_model-00009-of-00003.bin"}, "its own folder"),
        ({"a.weight": "config.json"}, "its own folder"),
        ({"a.weight": 3}, "its own folder"),
        ({"a.lost": "pytorch_model-00001-of-00003.bin"}, "Got no 'a.lost'"),
    ],
)
def test_an_index_names_only_what_is_there(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"].update(change)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    torch.save(tensors(), tmp_path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(ConversionError, match=r"unique over all shards. Got 'a.weight'"):
        convert(tmp_path, tmp_path / "out")


def test_folders_without_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"Got none. Pass one file"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"Pass the folder as it is"):
        convert(tmp_path, tmp_path / "out")
    for name in ("a.pt", "b.pt"):
        torch.save(tensors(), tmp_path / name)
    with pytest.raises(ConversionError, match=r"Got 2 files \(a.pt, b.pt\)"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"must be one of .*Got 'model.safetensors'"):
        convert(tmp_path / "model.safetensors", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pt")
    with pytest.raises(ConversionError, match="must be new or empty"):
        convert(tmp_path / "w.pt", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
