"""Mixture-of-experts models from run to checkpoint: fused experts are layers like all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tiny = Callable[[str], Any]
Answer = Callable[..., Any]


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_plan_for_experts_is_written_as_it_was_measured(
    kind: str, answer: Answer, tiny: Tiny, few: tuple[str, ...], tmp_path: Path
) -> None:
    model, path, out = tiny(kind), tmp_path / "plan.json", tmp_path / "out"
    (told,) = answer(
        *("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--schemes", "w2,w3-gptq,w4,w8"),
        *(
            "--latency",
            "roofline:h100",
            "--context-length",
            "64",
            "--pin",
            "*.0.*.down_proj=w3-gptq",
            "-o",
            path,
        ),
    )
    plan = json.loads(path.read_text())
    experts = {name: layer for name, layer in plan["layers"].items() if layer["op"].startswith("experts")}
    assert len(experts) == 4
    assert not [name for name in plan["layers"] if name.endswith(("gate", "router"))]
    assert plan["totals"]["bits_per_weight"] <= 5
    layers = plan["layers"].values()
    assert plan["totals"]["bytes"] == sum(layer["bytes"] for layer in layers)
    assert plan["totals"]["bops"] > 0
    costs = told["resources"]
    assert costs["active_bytes"] < costs["memory_bytes"]
    assert costs["latency_ns"] > 0
    data = ("--data", model.data, "--calibration", model.data)
    applied = answer("apply", model.folder, path, "-o", out, "--calibration", model.data)
    assert not applied["forced"]
    planned = answer("evaluate", model.folder, "--plan", path, *data)
    found = answer("evaluate", out, "--plan", path, *data, "--force")
    assert found["full_precision"]["quality"] == planned["plan"]["quality"]
    assert planned["plan"]["quality"] != planned["full_precision"]["quality"]


def test_a_runtime_without_experts_says_so_and_plans_the_rest(answer: Answer, tiny: Tiny) -> None:
    model = tiny("mixtral")
    cheap = ("--metric", "weight_error", "--no-interactions", "--samples", "8", "--evaluations", "0")
    ask = ("run", model.folder, "-c", model.data, "-b", "8 bpw", *cheap, "--schemes", "w4,w8")
    told = answer(*ask, "--runtime", "openvino", code=2)
    assert "experts.gate_up_proj (experts, 96 x 16): experts layers take bf16*, fp16*" in told["error"]
    (plan,) = answer(*ask, "--runtime", "openvino", "--exclude", "*.experts.*")
    assert len(plan["document"]["layers"]) == 8
