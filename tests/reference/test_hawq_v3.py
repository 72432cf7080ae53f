"""HAWQ-V3's eighteen published allocations, through `bitplan allocate`."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.cli.allocate import allocate

pytestmark = pytest.mark.reference

DEFAULT = Path(__file__).parents[2].parent / "shared" / "reference"
FOLDER = Path(os.environ.get("BITPLAN_REFERENCE_DIR", DEFAULT)) / "hawq_v3"
RESOURCES = {"modelsize": "bytes", "bops": "bops", "latency": "latency_ms"}
BEATEN = ("resnet50", "modelsize", 0.25)


def _read(name: str) -> Any:
    if not (FOLDER / name).exists():
        pytest.skip(f"the published inputs are not here: {FOLDER / name} (set BITPLAN_REFERENCE_DIR)")
    return json.loads((FOLDER / name).read_text(), parse_float=Decimal)


def _cases() -> list[tuple[str, str, float]]:
    return [(m, c, r) for m in ("resnet18", "resnet50") for c in RESOURCES for r in (0.25, 0.5, 0.75)]


def _table(model: str) -> dict[str, Any]:
    """w4 costs 0, w8 trace * (d8 - d4); sizes P * b / 8, BOPs MACs * b^2 / 1024, latencies as published."""
    inputs = _read(f"ilp_inputs_{model}.json")
    raw = model == "resnet18"
    parameters = [Decimal(p) / (1024 * 1024 if raw else 1) for p in inputs["parameters"]]
    macs = [Decimal(m) / (10**6 if raw else 1) for m in inputs["bops"]]
    losses = zip(
        inputs["Hutchinson_trace"],
        inputs["delta_weights_8bit_square"],
        inputs["delta_weights_4bit_square"],
        strict=True,
    )
    group = {
        member: f"group{i}" for i, members in enumerate(inputs["equal_bits_groups"]) for member in members
    }
    layers = [
        {"name": name, "parameters": int(inputs["parameters"][i] if raw else inputs["parameters"][i] * 10**6)}
        | ({"group": group[i]} if i in group else {})
        for i, name in enumerate(inputs["layer_names_in_array_order"])
    ]
    return {
        "schema": "bitplan.table/1",
        "layers": layers,
        "schemes": ["w4", "w8"],
        "metrics": {
            "omega": {
                "direction": "min",
                "values": [[0.0, float(t) * (float(a) - float(b))] for t, a, b in losses],
            }
        },
        "resources": {
            "bytes": [[p / 2, p] for p in parameters],
            "bops": [[m / 64, m / 16] for m in macs],
            "latency_ms": [
                list(row) for row in zip(inputs["latency_int4"], inputs["latency_int8"], strict=True)
            ],
        },
    }


def _json(value: Any) -> str:
    """JSON in which decimals keep every digit."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return format(value, "f") if isinstance(value, Decimal) else json.dumps(value)


def _allocate(folder: Path, model: str, *arguments: str) -> Any:
    path = folder / "table.json"
    path.write_text(_json(_table(model)))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(allocate)
    result = CliRunner().invoke(app, [str(path), *arguments, "--gap", "0", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("model", "constraint", "ratio"), _cases())
def test_published_configurations(tmp_path: Path, model: str, constraint: str, ratio: float) -> None:
    [expected] = [
        case
        for case in _read("expected_18_ilps.json")
        if (case["model"], case["constraint"], float(case["ratio"])) == (model, constraint, ratio)
    ]
    resource = RESOURCES[constraint]
    answers = [
        _allocate(tmp_path, model, "--limit", f"{resource}<={ratio} of range"),
        _allocate(tmp_path, model, "--limit", f"{resource}<={expected['limit']}"),
    ]
    for answer in answers:
        assert answer["status"] == "optimal"
        assert answer["gap"] == 0
        assert answer["objective"] == pytest.approx(float(expected["optimal_objective"]), rel=1e-12)
        assert answer["resources"][resource] == pytest.approx(float(expected["optimal_used"]), rel=1e-12)
        assert [int(scheme[1:]) for scheme in answer["choice"].values()] == expected["optimal_bits"]
        published = float(expected["published_objective"])
        if (model, constraint, ratio) == BEATEN:
            assert answer["objective"] == pytest.approx(-0.831387, abs=5e-7)
            assert answer["objective"] < published - 0.008
        else:
            assert expected["published_bits"] == expected["optimal_bits"]


def test_ties_hold_on_the_command_line_too(tmp_path: Path) -> None:
    inputs = _read("ilp_inputs_resnet18.json")
    names = inputs["layer_names_in_array_order"]
    ties = [
        argument
        for group in inputs["equal_bits_groups"]
        for argument in ("--tie", ",".join(names[i] for i in group))
    ]
    answer = _allocate(tmp_path, "resnet18", "--limit", "bytes<=0.5 of range", *ties)
    assert answer["objective"] == pytest.approx(-1.2332071988780002, rel=1e-12)
