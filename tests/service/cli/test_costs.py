"""Runtimes and costs of whole runs: timed kernels, a device of one's own, and rules that plans keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quant.devices import DEVICES
from quant.lint import lint
from quant.plan import plan_from_json
from quant.runtimes import RUNTIMES

Tiny = Callable[[str], Any]
Answer = Callable[..., Any]
CHEAP = ("--metric", "weight_error", "--no-interactions", "--samples", "8", "--evaluations", "0")


def test_a_run_for_a_runtime_with_measured_latency(answer: Answer, tiny: Tiny, data_dir: Path) -> None:
    model = tiny("llama")
    ask = ("run", model.folder, "-c", model.data, "-b", "latency<=1 s", *CHEAP, "--schemes", "w4,w6,w8")
    (plan,) = answer(*ask, "--runtime", "openvino", "--latency", "measured", "--context-length", "64")
    assert plan["status"] == "optimal"
    assert plan["cost_sources"]["latency"]["source"] == plan["document"]["latency"] == "measured"
    assert plan["resources"]["latency_ns"] > 0
    assert plan["resources"]["memory_bytes"] == sum(
        plan["resources"][name] for name in ("checkpoint_bytes", "kv_cache_bytes")
    )
    assert plan["resources"]["kv_cache_bytes"] > 0
    document = plan_from_json(plan["document"])
    assert document.totals.checkpoint_bytes == plan["resources"]["checkpoint_bytes"]
    assert lint(document, RUNTIMES["openvino"]) == ()
    assert set(document.assignment.values()) <= {"w4", "w8"}
    assert list((data_dir / "latency").glob("*.json"))
    (again,) = answer(*ask, "--runtime", "openvino", "--latency", "measured", "--context-length", "64")
    assert again["resources"] == plan["resources"]


def test_a_runtime_that_runs_no_scheme_is_bad_input(answer: Answer, tiny: Tiny) -> None:
    model = tiny("llama")
    ask = ("run", model.folder, "-c", model.data, "-b", "4 bpw", *CHEAP, "--schemes", "w3,w5")
    told = answer(*ask, "--runtime", "vllm", code=2)
    assert "must hold a scheme that vllm runs" in told["error"]


def test_a_device_of_ones_own(answer: Answer, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    profile = tmp_path / "mine.json"
    profile.write_text(json.dumps(DEVICES["h100"].as_json() | {"name": "mine"}))
    ask = ("run", model.folder, "-c", model.data, "-b", "latency<=1 s", *CHEAP, "--schemes", "w4,w8")
    costs = ("--latency", "roofline:mine", "--energy", "device:mine", "--device-profile", profile)
    (plan,) = answer(*ask, *costs)
    assert plan["document"]["latency"] == "roofline:mine"
    assert plan["resources"]["energy_pj"] > 0
    told = answer(*ask, "--latency", "roofline:theirs", code=2)
    assert "Got 'theirs'" in told["error"]
