from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

TABLE: dict[str, Any] = {
    "schema": "bitplan.table/1",
    "layers": [
        {"name": "q", "parameters": 100, "group": "qk"},
        {"name": "k", "parameters": 100, "group": "qk"},
        {"name": "up", "parameters": 200},
        {"name": "down", "parameters": 200},
    ],
    "schemes": ["w2", "w4", "w8"],
    "metrics": {
        "loss": {
            "direction": "min",
            "values": [[0.9, 0.1, 0.0], [0.5, 0.4, 0.35], [0.3, 0.1, 0.0], [0.6, 0.2, 0.1]],
            "stderr": [[0.05] * 3] * 4,
        }
    },
    "resources": {"bytes": [[25, 50, 100], [25, 50, 100], [50, 100, 200], [50, 100, 200]]},
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    return path


def test_explain_tells_steps_margins_stability_and_what_ties_and_pins_cost(
    bitplan: Callable[..., Result], answer: Callable[..., Any], table: Path
) -> None:
    asked = ("explain", table, "--limit", "bytes<=275", "--pin", "down=w4")
    found = answer(*asked, "--draws", "100")
    assert (found["status"], found["metric"], found["stability"]["draws"]) == ("optimal", "loss", 100)
    assert [one["layers"] for one in found["decisions"]] == [["q", "k"], ["up"], ["down"]]
    without = {one["name"]: one["objective_without"] for one in found["restrictions"]}
    for option, name in (((), "down=w4"), (("--pin", "down=w4"), "group qk")):
        changed = {
            **TABLE,
            "layers": [
                {k: v for k, v in one.items() if k != "group" or not option} for one in TABLE["layers"]
            ],
        }
        table.write_text(json.dumps(changed))
        plain = answer("allocate", table, "--limit", "bytes<=275", *option)
        assert without[name] == pytest.approx(plain["objective"])
    table.write_text(json.dumps(TABLE))
    words = bitplan(*asked)
    assert words.exit_code == 0
    assert "tie group qk: costs" in words.stdout
    assert "q + k" in words.stdout
    assert "price of bytes:" in words.stdout
    assert "not a bound" in words.stdout


def test_explain_says_why_nothing_fits(bitplan: Callable[..., Result], table: Path) -> None:
    result = bitplan("explain", table, "--limit", "bytes<=180", "--pin", "down=w4")
    assert result.exit_code == 3
    assert "Cannot hold together (smallest set)" in result.stdout
    assert "pin down=w4" in result.stdout


def test_a_servers_plan_brings_its_own_question(bitplan: Callable[..., Result]) -> None:
    result = bitplan("explain", "plan_1", "--limit", "bytes<=180")
    assert result.exit_code == 2
    assert "must come with a table" in result.stderr


def test_frontier_shows_corners_and_what_lies_between_them(
    bitplan: Callable[..., Result], answer: Callable[..., Any], table: Path
) -> None:
    corners = answer("frontier", table)["items"]
    used = [one["resources"]["bytes"] for one in corners]
    assert (used[0], used[-1]) == (150, 600)
    assert all(one["gap"] <= 1e-9 for one in corners)
    between = answer("frontier", table, "--between", "150", "0.3 kB")
    assert between["complete"] is True
    assert {one for one in used if one <= 300} <= {one["resources"]["bytes"] for one in between["items"]}
    kept = answer("frontier", table, "--forbid", "down=w2,w8")["items"]
    assert {one["layers"]["down"] for one in kept} == {"w4"}
    words = bitplan("frontier", table, "--between", "150", "600", "--points", "2")
    assert words.exit_code == 0
    assert "600 |" not in words.stdout
    assert "*" in words.stdout
    assert "some are left out: --between 150 " in words.stdout
    assert bitplan("frontier", table, "--resource", "joy").exit_code == 2
    assert bitplan("frontier", table, "--between", "9", "8").exit_code == 2


def test_explain_and_frontier_tell_of_fused_candidates(
    bitplan: Callable[..., Result], answer: Callable[..., Any], table: Path
) -> None:
    candidate = {"layers": ["up", "down"], "scheme": "w4", "resources": {"bytes": 150}}
    table.write_text(json.dumps(TABLE | {"fused": [candidate]}))
    asked = ("explain", table, "--limit", "bytes<=250")
    found = answer(*asked, "--draws", "10")
    assert [(one["layers"], one["scheme"]) for one in found["decisions"]] == [
        (["q", "k"], "w4"),
        (["up", "down"], "w4 fused"),
    ]
    assert [(one["layers"], one["scheme"]) for one in found["fused"]] == [(["up", "down"], "w4")]
    assert "fused: up + down at w4" in bitplan(*asked).stdout
    items = answer("frontier", table)["items"]
    assert [bool(one["fused"]) for one in items] == [False, False, True, True, False]
    assert all(one["resources"]["bytes"] >= 150 for one in items)
