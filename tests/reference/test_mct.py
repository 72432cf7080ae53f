"""The knapsacks of Model Compression Toolkit's own solver tests, through `bitplan allocate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.cli.allocate import allocate

pytestmark = pytest.mark.reference

DEFAULT = Path(__file__).parents[2].parent / "shared" / "reference"
FOLDER = Path(os.environ.get("BITPLAN_REFERENCE_DIR", DEFAULT))
FILE = FOLDER / "known_answer_vectors" / "sony_mct_mckp.json"
CASES = 17


def _case(index: int) -> dict[str, Any]:
    if not FILE.exists():
        pytest.skip(f"the published cases are not here: {FILE} (set BITPLAN_REFERENCE_DIR)")
    cases = json.loads(FILE.read_text())["cases"]
    assert len(cases) == CASES
    return cases[index]  # type: ignore[no-any-return]


def _table(case: dict[str, Any]) -> dict[str, Any]:
    """Layers have different numbers of candidates: what a layer lacks is null. One resource per limit
    (memory cut)."""
    layers = case["sensitivity"]
    width = max(map(len, layers.values()))
    usage = iter(case["ru"])
    rows = [[next(usage) for _ in values] for values in layers.values()]
    resources = {
        f"cut{k}": [[row[c][k] if c < len(row) else None for c in range(width)] for row in rows]
        for k in range(len(case["limit"]))
    }
    values = [[row[c] if c < len(row) else None for c in range(width)] for row in layers.values()]
    return {
        "schema": "bitplan.table/1",
        "layers": [{"name": name, "parameters": 1} for name in layers],
        "schemes": [f"c{c}" for c in range(width)],
        "metrics": {"sensitivity": {"direction": "min", "values": values}},
        "resources": resources,
    }


@pytest.mark.parametrize("index", range(CASES))
def test_published_answers(tmp_path: Path, index: int) -> None:
    case = _case(index)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(_table(case)))
    limits = [
        argument for k, limit in enumerate(case["limit"]) for argument in ("--limit", f"cut{k}<={limit}")
    ]
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(allocate)
    result = CliRunner().invoke(app, [str(path), *limits, "--json"])
    answer = json.loads(result.stdout)
    if case["expected"] is None:
        assert result.exit_code == 3
        assert answer["status"] == "infeasible"
        assert answer["least_budget"].keys() == {f"cut{k}" for k in range(len(case["limit"]))}
        return
    assert result.exit_code == 0
    assert answer["status"] == "optimal"
    assert answer["choice"] == {name: f"c{index}" for name, index in case["expected"].items()}
