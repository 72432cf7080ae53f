"""The demo keeps its promise: at every budget, for both models, the plan beats every uniform scheme that fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = ("digits-resnet", "topics-llama")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "examples/demo.py", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_beats_every_uniform_scheme_that_fits(demo, model):
    out, _ = demo
    plans = json.loads((out / "plans" / f"{model}.json").read_text())
    assert [plan["budget"] for plan in plans] == ["2.5 bpw", "3.5 bpw", "uniform w4-asym-gptq"]
    for plan in plans:
        entries = {entry["name"]: entry for entry in plan["evidence"]["entries"]}
        uniform = [entry for name, entry in entries.items() if name.startswith("uniform ")]
        fitting = [entry for entry in uniform if entry["within_limits"]]
        assert fitting
        assert all(entry["bytes"] >= 0 and entry["difference"]["low"] > 0 for entry in fitting)
        assert plan["evidence"]["verdict"]["beats_all_uniform"]
        assert plan["evidence"]["part"] == "reporting"
    assert entries["plan"]["bytes"] <= entries["uniform w4-asym-gptq"]["bytes"]


@pytest.mark.slow
def test_the_demo_shows_tables_files_and_the_way_to_the_docs(demo):
    out, shown = demo
    for words in (
        "full precision",
        "uniform w2-asym-adaround",
        "plan 2.5 bpw",
        "beats every uniform scheme",
        "/docs",
    ):
        assert words in shown
    for model in MODELS:
        for budget in ("2.5-bpw", "3.5-bpw", "uniform-w4-asym-gptq"):
            assert (out / "plans" / f"{model}-{budget}.plan.json").is_file()
            assert (out / "plans" / f"{model}-{budget}" / "model.safetensors").is_file()
