from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from quant.layers import Inventory, Layer
from quant.plan import Certificate, Digests, plan_json
from quant.planning import build_plan
from service.cli.main import app


@pytest.fixture
def plan_file(tmp_path):
    def write(runtime=None, **schemes):
        layers = tuple(
            Layer(name, "linear", (128, 256), (128, 256), 128 * 256, None, "other", (), "float32")
            for name in schemes
        )
        plan = build_plan(
            Inventory(layers, (), 128 * 256 * len(layers), 0),
            schemes,
            digests=Digests(),
            certificate=Certificate("feasible"),
            source="test",
            runtime=runtime,
        )
        path = tmp_path / "plan.json"
        path.write_text(plan_json(plan))
        return str(path)

    return write


def test_lint_explains_each_violation_and_exits_2(plan_file):
    path = plan_file(q_proj="w4", k_proj="w8", o_proj="w3")
    done = CliRunner().invoke(app, ["lint", path, "--runtime", "vllm", "--json"])
    assert done.exit_code == 2
    rules = {row["layer"]: row["rule"] for row in json.loads(done.stdout)["violations"]}
    assert set(rules) == {"q_proj", "o_proj"}
    assert "fused with k_proj" in rules["q_proj"]
    assert "not w3" in rules["o_proj"]
    shown = CliRunner().invoke(app, ["lint", path, "--runtime", "llama.cpp"])
    assert shown.exit_code == 2
    assert "3 violations of llama.cpp" in shown.stdout


def test_lint_is_content_with_what_the_runtime_runs(plan_file):
    done = CliRunner().invoke(app, ["lint", plan_file("vllm", q_proj="w4", k_proj="w4")])
    assert done.exit_code == 0
    assert "vllm runs all 2 layers" in done.stdout


def test_lint_needs_a_runtime(plan_file):
    done = CliRunner().invoke(app, ["lint", plan_file(q_proj="w4")])
    assert done.exit_code == 2
    assert "must be one of vllm" in done.stderr
