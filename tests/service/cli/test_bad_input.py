"""Bad input of every kind: one message that says what to do, status 2, no traceback, JSON when asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file

Tiny = Callable[[str], Any]
Refused = Callable[..., str]


@pytest.fixture
def refused(bitplan: Callable[..., Result]) -> Refused:
    """The message with which a command refuses; with --json it must say the same on standard output."""

    def run(*arguments: object) -> str:
        result = bitplan(*arguments, "--json")
        assert result.exit_code == 2, result.stdout + result.stderr
        told = json.loads(result.stdout)
        assert told["exit"] == 2
        assert result.stderr == f"bitplan: {told['error']}\n"
        assert "Traceback" not in result.stderr
        return str(told["error"])

    return run


@pytest.fixture
def resnet(tiny: Tiny, few: tuple[str, ...]) -> Callable[..., list[str]]:
    """Arguments of a sound run, to which a fault is added."""
    model = tiny("resnet")

    def arguments(folder: Path | None = None, data: Path | None = None, budget: str = "5 bpw") -> list[str]:
        return [
            "run", str(folder or model.folder), "-c", str(data or model.data), "-b", budget, *few,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny ResNet's folder that a test may spoil."""
    return shutil.copytree(
        tiny("resnet").folder, tmp_path / "copy", ignore=shutil.ignore_patterns("images.safetensors")
    )


def test_a_webhook_needs_a_secret(
    refused: Refused, resnet: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITPLAN_WEBHOOK_SECRET", raising=False)
    message = refused("submit", *resnet()[1:], "--webhook", "https://hooks.example.com/")
    assert message.startswith("--webhook must come with a secret. Got none. Set BITPLAN_WEBHOOK_SECRET")


# -- the model ------------------------------------------------------------------------------------


def test_a_missing_model_folder(refused: Refused, resnet: Any, tmp_path: Path) -> None:
    assert "Pass a Hugging Face folder" in refused(*resnet(tmp_path / "none"))


def test_no_model_and_two_models(refused: Refused, resnet: Any) -> None:
    sound = resnet()
    assert "Got 2 of them" in refused(*sound, "--factory", "a:b")
    assert "Got 0 of them" in refused("run", *sound[2:])


def test_a_pickle_instead_of_weights(refused: Refused, resnet: Any, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    message = refused(*resnet(copy))
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_a_config_that_is_no_model(refused: Refused, resnet: Any, copy: Path) -> None:
    (copy / "config.json").write_text("{}")
    assert "model_type" in refused(*resnet(copy))


def test_a_model_that_is_already_quantized(refused: Refused, resnet: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert "Send the original model" in refused(*resnet(copy))


def test_a_model_with_nothing_to_quantize(refused: Refused, resnet: Any) -> None:
    assert "at least one layer" in refused(*resnet(), "--exclude", "*")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("no_such_module:build", "must import"),
        ("tiny_factory:missing", "must hold a function 'missing'"),
        ("tiny_factory:not_a_model", "must return an nn.Module"),
        ("tiny_factory:fails", "must work without arguments"),
        ("tiny_factory", "package.module:function"),
    ],
)
def test_factories_that_are_none(
    refused: Refused, tiny: Tiny, few: tuple[str, ...], factory: str, words: str
) -> None:
    data = tiny("mlp").data
    assert words in refused("run", "--factory", factory, "-c", data, "-b", "5 bpw", *few)


# -- calibration ----------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.safetensors", b"", "safetensors"),
        ("empty.txt", b"", "at least"),
        ("empty.jsonl", b"", "at least"),
        ("images.png", b"x", "must be one of"),
        ("data.pkl", pickle.dumps([1]), "safetensors.torch.save_file"),
        ("data.pt", pickle.dumps([1]), "safetensors.torch.save_file"),
        ("renamed.safetensors", pickle.dumps([1]), "pickle"),
        ("rows.jsonl", b"not json\n" * 20, "row"),
        ("latin.txt", "caf\xe9\n".encode("latin-1") * 20, "UTF-8"),
    ],
)
def test_calibration_that_cannot_be_read(
    refused: Refused, resnet: Any, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    assert words.lower() in refused(*resnet(data=write(tmp_path / name, content))).lower()


def test_a_missing_calibration_file(refused: Refused, resnet: Any, tmp_path: Path) -> None:
    assert "is no file. Check the path." in refused(*resnet(data=tmp_path / "none.txt"))


def test_calibration_of_another_kind_than_the_model_takes(
    refused: Refused, resnet: Any, tmp_path: Path
) -> None:
    message = refused(*resnet(data=write(tmp_path / "lines.txt", b"some words here\n" * 30)))
    assert "Got" in message


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"pixel_values": np.zeros((20, 3, 16, 16), np.float32)}, "must accept the calibration inputs"),
        ({"pixel_values": np.zeros((2, 1, 16, 16), np.float32)}, "at least 6 samples"),
        ({"pixel_values": np.full((20, 1, 16, 16), np.nan, np.float32)}, "must be finite"),
        ({"labels": np.zeros(20, np.int64)}, "Got only labels"),
        (
            {"pixel_values": np.zeros((20, 1, 16, 16), np.float32), "labels": np.zeros(19, np.int64)},
            "same first dimension",
        ),
    ],
)
def test_calibration_of_the_wrong_shape(
    refused: Refused, resnet: Any, tmp_path: Path, tensors: Any, words: str
) -> None:
    save_file(tensors, tmp_path / "data.safetensors")
    assert words in refused(*resnet(data=tmp_path / "data.safetensors"))


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schemes", "w99"], "--schemes: "),
        (["--schemes", "w4a8"], "--schemes: "),
        (["--schemes", ","], "--schemes: "),
        (["--schemes", "w4,w4"], "must be distinct"),
        (["--limit", "lots"], "--limit: "),
        (["--metric", "beauty"], "A metric must be one of"),
        (["--metric", "hessian_trace", "--task", "generic"], "hessian_trace"),
        (["--task", "knitting"], "A task must be one of"),
        (["--device", "tpu"], "--device: "),
        (["--chooser", "dice"], "A chooser must be one of local_search, nsga2, motpe, black_box"),
        (["--gap", "2"], "--gap: "),
        (["--time-limit", "0"], "--time-limit: "),
        (["--relative-error", "0"], "--relative-error: "),
        (["--pin", "lm_head"], "LAYER=SCHEME"),
        (["--pin", "resnet.encoder.stages.0.layers.0.layer.0.convolutoin=w4"], "convolution"),
        (["--pin", "classifier.1=w99"], "--pin: "),
        (["--pin", "nothing.*=w4"], "matches nothing"),
        (["--tie", "nothing.*,other"], "matches nothing"),
        (["--include", "nothing.*"], "matches nothing"),
        (["--exclude", "nothing.*"], "matches nothing"),
        (["--latency-table", "none.csv"], "none.csv"),
    ],
)
def test_options_that_say_nothing_sensible(
    refused: Refused, resnet: Any, arguments: list[str], words: str
) -> None:
    assert words in refused(*resnet(), *arguments)


@pytest.mark.parametrize(
    "budget", ["", "lots", "3.5", "bytes<=", "bytes<=0", "-1 bpw", "watts<=3", "1e400 bpw"]
)
def test_budgets_that_say_nothing_sensible(refused: Refused, resnet: Any, budget: str) -> None:
    assert "Got" in refused(*resnet(budget=budget))


def test_no_budget(refused: Refused, resnet: Any) -> None:
    sound = resnet()
    del sound[4:6]
    assert "A budget or a target must be given" in refused(*sound)


def test_a_dry_run_refuses_the_same(refused: Refused, resnet: Any, tmp_path: Path) -> None:
    data = ("--dry-run", "--data-dir", tmp_path / "new")
    assert "matches nothing" in refused(*resnet(), "--pin", "nothing.*=w4", *data)
    assert "latency" in refused(*resnet(budget="latency<=1 us"), *data)
    assert not (tmp_path / "new").exists()


def test_outputs_that_cannot_be_written(refused: Refused, resnet: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "file", b"")
    assert "must be a file" in refused(*resnet(), "-o", tmp_path)
    assert "must be a folder" in refused(*resnet(), "-b", "6 bpw", "-o", file)
    assert "is a file" in refused(*resnet(), "-o", file / "plan.json")


def test_a_database_that_is_none(refused: Refused, resnet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_DATABASE_URL", "mysql://host/name")
    assert "must name a SQLite file or a PostgreSQL database" in refused(*resnet())


def test_a_host_that_others_could_reach(bitplan: Callable[..., Result], tmp_path: Path) -> None:
    result = bitplan("serve", "--host", "0.0.0.0", "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert "must be a loopback address" in result.stderr
    assert result.stdout == ""
