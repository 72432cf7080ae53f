"""`bitplan convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from quant.digest import folder_digest


@pytest.fixture
def pickled(tiny: Any, tmp_path: Path) -> Path:
    """A model's folder with the weights that torch.save writes."""
    folder: Path = tmp_path / "pickled"
    folder.mkdir()
    for file in Path(tiny("resnet").folder).iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(Path(tiny("resnet").folder) / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_a_pickled_model_becomes_one_that_bitplan_takes(
    bitplan: Callable[..., Result], pickled: Path, tiny: Any, tmp_path: Path
) -> None:
    result = bitplan("convert", str(pickled), "-o", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["output"], told["has_config"]) == (str(tmp_path / "out"), True)
    expected = load_file(Path(tiny("resnet").folder) / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert told["tensors"] == len(expected)
    folder_digest(tmp_path / "out")


def test_it_says_what_it_wrote_and_shows_progress(
    bitplan: Callable[..., Result], pickled: Path, tmp_path: Path
) -> None:
    file = tmp_path / "alone.pt"
    (pickled / "pytorch_model.bin").rename(file)
    result = bitplan("convert", str(file), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert f"wrote {tmp_path / 'out'}: " in result.stdout
    assert "config.json was not beside the weights" in result.stdout
    assert "converting" in result.stderr


def test_what_cannot_be_read_safely_is_bad_input(bitplan: Callable[..., Result], tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    result = bitplan("convert", str(tmp_path / "model.pt"), "-o", str(tmp_path / "out"), "--json")
    assert result.exit_code == 2
    assert "must hold tensors alone" in json.loads(result.stdout)["error"]
    missing = bitplan("convert", str(tmp_path / "none.pt"), "-o", str(tmp_path / "out"))
    assert (missing.exit_code, "none.pt" in missing.stderr) == (2, True)
