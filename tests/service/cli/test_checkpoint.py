"""`bitplan apply`, `bitplan checkpoint` and `bitplan evaluate`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Tiny = Callable[[str], Any]
Bitplan = Callable[..., Result]
Answer = Callable[..., Any]


@pytest.fixture
def plan(answer: Answer, tiny: Tiny, few: tuple[str, ...], tmp_path: Path) -> Path:
    """A plan for the tiny ResNet."""
    model, path = tiny("resnet"), tmp_path / "plan.json"
    answer("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "-o", path)
    return path


@pytest.fixture
def other(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder with other weights of the same shapes."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("resnet").folder, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def test_the_checkpoint_loads_and_measures_as_the_plan_did(
    bitplan: Bitplan, answer: Answer, tiny: Tiny, plan: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    model, out = tiny("resnet"), tmp_path / "out"
    result = bitplan("apply", model.folder, plan, "-o", out)
    assert (result.exit_code, result.stdout) == (0, f"wrote {out}\n")
    assert AutoModelForImageClassification.from_pretrained(out).config.num_labels == 5
    planned = answer("evaluate", model.folder, "--plan", plan, "--data", model.data)
    applied = answer("evaluate", out, "--plan", plan, "--data", model.data, "--force")
    assert planned["plan"]["samples"] == 20
    assert applied["full_precision"]["quality"] == planned["plan"]["quality"]
    assert planned["bytes"] == json.loads(plan.read_text())["totals"]["bytes"]


def test_apply_answers_in_json(answer: Answer, tiny: Tiny, plan: Path, tmp_path: Path) -> None:
    told = answer("apply", tiny("resnet").folder, plan, "-o", tmp_path / "out")
    assert told["output"] == str(tmp_path / "out")
    assert not told["forced"]


def test_evaluate_shows_a_table(bitplan: Bitplan, tiny: Tiny, plan: Path) -> None:
    model = tiny("resnet")
    result = bitplan("evaluate", model.folder, "--plan", plan, "--data", model.data)
    assert result.exit_code == 0
    for words in ("full precision", "plan", "accuracy", "divergence"):
        assert words in result.stdout


def test_evaluate_stores_nothing(
    answer: Answer, tiny: Tiny, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "new"))
    model = tiny("resnet")
    answer("evaluate", model.folder, "--plan", plan, "--data", model.data)
    assert not (tmp_path / "new").exists()


def test_a_plan_for_another_model_needs_force(
    bitplan: Bitplan, answer: Answer, tiny: Tiny, plan: Path, other: Path, tmp_path: Path
) -> None:
    data = tiny("resnet").data
    for ask in (
        ["apply", other, plan, "-o", tmp_path / "out"],
        ["checkpoint", other, plan, "--to", "pytorch", "-o", tmp_path / "out"],
        ["checkpoint", other, plan, "--to", "pytorch", "--dry-run"],
        ["evaluate", other, "--plan", plan, "--data", data],
    ):
        refused = bitplan(*ask)
        assert refused.exit_code == 2
        assert "Plan must be made for this model" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    assert answer("apply", other, plan, "-o", tmp_path / "out", "--force")["forced"]
    assert answer("evaluate", other, "--plan", plan, "--data", data, "--force")["plan"]["samples"] == 20


def test_another_model_is_told_before_other_data(
    bitplan: Bitplan, answer: Answer, tiny: Tiny, few: tuple[str, ...], other: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model, plan, data = tiny("resnet"), tmp_path / "gptq.json", tmp_path / "data.safetensors"
    answer("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--schemes", "w4-gptq,w8", "-o", plan)
    save_file({name: tensor[:12] for name, tensor in load_file(model.data).items()}, data)
    for ask in (["apply"], ["checkpoint", "--to", "pytorch"]):
        for given in ([], ["--calibration", data]):
            refused = bitplan(*ask, other, plan, "-o", tmp_path / "out", *given)
            assert refused.exit_code == 2
            assert "Plan must be made for this model" in refused.stderr
        refused = bitplan(*ask, model.folder, plan, "-o", tmp_path / "out", "--calibration", data)
        assert "--calibration must be the file that the plan was made with" in refused.stderr


def test_an_output_in_use_is_refused(bitplan: Bitplan, tiny: Tiny, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    result = bitplan("apply", tiny("resnet").folder, plan, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "must be new or empty" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be a JSON document"),
        (b"[]", "Plan"),
        (b'{"schema": "bitplan.plan/9"}', "Plan schema must be"),
        (b"\xff\xfe", "Plan must be a JSON document"),
    ],
)
def test_malformed_plans_are_refused(
    bitplan: Bitplan, tiny: Tiny, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    model = tiny("resnet")
    for ask in (
        ["apply", model.folder, tmp_path / "plan.json", "-o", tmp_path / "out"],
        ["checkpoint", model.folder, tmp_path / "plan.json", "--to", "pytorch", "-o", tmp_path / "out"],
        ["evaluate", model.folder, "--plan", tmp_path / "plan.json", "--data", model.data],
    ):
        result = bitplan(*ask)
        assert result.exit_code == 2
        assert words in result.stderr


def test_a_plan_file_that_is_missing(bitplan: Bitplan, tiny: Tiny, tmp_path: Path) -> None:
    result = bitplan("apply", tiny("resnet").folder, tmp_path / "none.json", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "A file must exist and be readable" in result.stderr


def test_checkpoint_tells_its_files_before_it_writes_them(
    bitplan: Bitplan, answer: Answer, tiny: Tiny, plan: Path, tmp_path: Path
) -> None:
    ask, out = ("checkpoint", tiny("resnet").folder, plan, "--to", "pytorch"), tmp_path / "out"
    told = answer(*ask, "--dry-run")
    shown = bitplan(*ask, "--dry-run")
    assert shown.exit_code == 0
    assert f"{told['bytes']:,}" in shown.stdout
    assert not out.exists()
    written = answer(*ask, "-o", out)
    assert {key: written[key] for key in told} == told
    assert {path.name: path.stat().st_size for path in out.iterdir()} == {
        file["name"]: file["bytes"] for file in told["files"]
    }
    answer("apply", tiny("resnet").folder, plan, "-o", tmp_path / "applied")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "applied" / file.name).read_bytes()


def test_checkpoint_asks_for_what_it_needs(bitplan: Bitplan, tiny: Tiny, plan: Path, tmp_path: Path) -> None:
    folder = tiny("resnet").folder
    for options, words in (
        (["--to", "nosuch", "-o", tmp_path / "out"], "Consumer must be one of pytorch"),
        (["--to", "pytorch"], "Pass -o OUT, or --dry-run"),
    ):
        refused = bitplan("checkpoint", folder, plan, *options)
        assert refused.exit_code == 2
        assert words in refused.stderr
    missing = bitplan("checkpoint", tmp_path / "none", plan, "--to", "pytorch", "--dry-run")
    assert missing.exit_code == 2
    assert "Model must be a folder" in missing.stderr
