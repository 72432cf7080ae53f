from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from service.cli.allocate import allocate

TABLE: dict[str, Any] = {
    "schema": "bitplan.table/1",
    "layers": [{"name": f"blocks.0.{name}", "parameters": 100} for name in ("q", "k", "up")],
    "schemes": ["w2", "w4", "w8"],
    "metrics": {
        "loss": {"direction": "min", "values": [[0.9, 0.1, 0.0], [0.5, 0.2, 0.15], [0.3, None, 0.0]]}
    },
    "resources": {"bytes": [[25, 50, 100]] * 3, "latency_ns": [[10, 12.5, 20]] * 3},
}

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(allocate)
    app.callback()(lambda: None)

    def invoke(*arguments: str, table: Any = TABLE) -> Result:
        path = tmp_path / "table.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table))
        return CliRunner().invoke(app, ["allocate", str(path), *arguments])

    return invoke


def test_json_has_exactly_the_published_fields(run: Run) -> None:
    result = run("--limit", "bytes<=200", "--limit", "latency<=0.0425 us", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    seconds = answer.pop("seconds")
    assert 0 <= seconds < 10
    assert answer == {
        "status": "optimal",
        "solved_for": "sum",
        "parts": [],
        "objective": pytest.approx(0.5),
        "bound": pytest.approx(0.5),
        "gap": pytest.approx(0, abs=1e-9),
        "choice": {"blocks.0.q": "w8", "blocks.0.k": "w4", "blocks.0.up": "w2"},
        "fused": [],
        "resources": {"bytes": 175, "latency_ns": 42.5, "bits_per_weight": pytest.approx(14 / 3)},
        "reference": ANY,
        "shadow_prices": {"bytes": 0.0, "latency_ns": pytest.approx(0.03)},
        "least_budget": {},
        "conflict": None,
        "method": "labels",
        "why": ANY,
    }
    assert answer["reference"]["bits_per_weight"] == pytest.approx(14 / 3)


FUSED: dict[str, Any] = TABLE | {
    "fused": [{"layers": ["blocks.0.q", "blocks.0.k"], "scheme": "w4", "resources": {"latency_ns": 15}}]
}


def test_fused_candidates_are_told_with_what_they_count(run: Run) -> None:
    answer = json.loads(run("--limit", "latency<=0.035 us", "--json", table=FUSED).stdout)
    assert answer["choice"] == {"blocks.0.q": "w4", "blocks.0.k": "w4", "blocks.0.up": "w8"}
    assert answer["fused"] == [
        {
            "layers": ["blocks.0.q", "blocks.0.k"],
            "scheme": "w4",
            "metrics": {"loss": pytest.approx(0.3)},
            "resources": {"bytes": 100, "latency_ns": 15},
        }
    ]
    assert answer["resources"]["latency_ns"] == 35
    assert answer["objective"] == pytest.approx(0.3)
    assert answer["reference"] is None
    shown = run("--limit", "latency<=0.035 us", table=FUSED).stdout
    assert "fused: blocks.0.q + blocks.0.k at w4" in shown
    none = json.loads(run("--forbid", "*.k=w4", "--json", table=FUSED).stdout)
    assert none["fused"] == []


def test_fused_candidates_are_refused_with_words_where_they_make_no_sense(run: Run) -> None:
    refused = run("--objective", "minimax", table=FUSED)
    assert refused.exit_code == 2
    words = " ".join(refused.output.split())
    assert "The objective minimax must have a table without fused candidates" in words
    bad = TABLE | {"fused": [{"layers": ["blocks.0.q", "blocks.0.k"], "scheme": "w3"}]}
    assert run(table=bad).exit_code == 2


def test_limits_hold_together_and_are_compared_exactly(run: Run) -> None:
    at, below = (
        json.loads(run("--limit", f"bytes<=200,latency_ns<={x}", "--json").stdout) for x in (42.5, 42.4999)
    )
    assert at["resources"]["latency_ns"] == 42.5
    assert below["resources"]["latency_ns"] < 42.5
    assert below["objective"] > at["objective"]


def test_ties_and_pins_take_names_and_patterns(run: Run) -> None:
    tied = json.loads(run("--tie", "blocks.0.q,blocks.0.k", "--limit", "bytes<=200", "--json").stdout)
    assert tied["choice"]["blocks.0.q"] == tied["choice"]["blocks.0.k"]
    pinned = json.loads(run("--pin", "*.q=w2", "--pin", "blocks.0.up=w8", "--json").stdout)
    assert pinned["choice"] == {"blocks.0.q": "w2", "blocks.0.k": "w8", "blocks.0.up": "w8"}
    everything = json.loads(run("--tie", "blocks.*", "--json").stdout)
    assert len(set(everything["choice"].values())) == 1


@pytest.mark.parametrize("text", ["minimax_sum", "threshold", "rank_order"])
def test_objectives_are_named_with_their_parts(run: Run, text: str) -> None:
    answer = json.loads(run("--objective", text, "--limit", "bytes<=200", "--json").stdout)
    assert answer["solved_for"] == text
    if text == "minimax_sum":
        assert [part["name"] for part in answer["parts"]] == ["largest cost of a group", "sum"]
        assert answer["parts"][0]["value"] == 0.2
        assert answer["parts"][1]["value"] == answer["objective"] == pytest.approx(0.3)
    if text == "threshold":
        assert answer["status"] == "feasible"
        assert answer["bound"] is answer["gap"] is None
    shown = run("--objective", text, "--limit", "bytes<=200").stdout
    assert text in shown


def test_limits_may_be_on_metrics_and_are_exact(run: Run) -> None:
    metrics = {**TABLE["metrics"], "error": {"direction": "min", "values": [[0.3, 0.1, 0.1]] * 3}}
    table = {**TABLE, "metrics": metrics}
    tight, below = (
        json.loads(run("--metric", "loss", "--limit", f"error<={limit}", "--json", table=table).stdout)
        for limit in ("0.300000000000000016654", "0.300000000000000016653")
    )
    assert tight["status"] == "optimal"
    assert below["status"] == "infeasible", "three times the double 0.1 is more than 0.3"
    assert below["least_budget"] == {"error": pytest.approx(0.3)}
    both = run("--objective", "lexicographic: error, loss", "--limit", "bytes<=200", "--json", table=table)
    assert [part["value"] for part in json.loads(both.stdout)["parts"]] == pytest.approx([0.3, 0.3])


def test_a_table_may_have_interactions(run: Run) -> None:
    """Cells whose errors cancel are chosen together although each alone looks worse."""
    vectors = [[[0.9], [0.3], [0.0]], [[-0.7], [0.4], [0.3]], [[0.5], None, [0.0]]]
    table = {**TABLE, "interactions": {"gram": vectors}}
    answer = json.loads(
        run("--objective", "quadratic", "--limit", "bytes<=150", "--json", table=table).stdout
    )
    assert answer["status"] == "optimal"
    assert answer["choice"] == {"blocks.0.q": "w4", "blocks.0.k": "w2", "blocks.0.up": "w2"}
    assert answer["objective"] == pytest.approx(0.1 + 0.5 + 0.3 + 2 * (-0.21 + 0.15 - 0.35))
    ragged = {**TABLE, "interactions": {"gram": [[[1], [1, 2], [1]], *vectors[1:]]}}
    result = run("--objective", "quadratic", table=ragged)
    assert result.exit_code == 2
    assert "/interactions/gram/0/0 must have 2 numbers" in result.stderr


def test_forbidden_schemes_are_not_chosen(run: Run) -> None:
    free = json.loads(run("--limit", "bytes<=250", "--json").stdout)["choice"]
    assert free == {"blocks.0.q": "w8", "blocks.0.k": "w4", "blocks.0.up": "w8"}
    kept = json.loads(run("--limit", "bytes<=250", "--forbid", "*.q=w8", "--json").stdout)["choice"]
    assert kept == {"blocks.0.q": "w4", "blocks.0.k": "w8", "blocks.0.up": "w8"}
    none = run("--forbid", "blocks.0.up=w2,w8", "--json")
    assert none.exit_code == 3
    assert [one["name"] for one in json.loads(none.stdout)["conflict"]["members"]] == ["blocks.0.up=w2,w8"]
    for bad in ("blocks.0.up", "blocks.0.up=w3", "=w2"):
        refused = run("--forbid", bad)
        assert refused.exit_code == 2
        assert "must be" in refused.stderr
        assert "LAYER=SCHEME" in refused.stderr


def test_a_limit_on_a_maximum_holds_at_every_cut(run: Run) -> None:
    layers = [layer["name"] for layer in TABLE["layers"]]
    table = TABLE | {"maxima": {"peak": {"resource": "bytes", "cuts": [layers[:2], layers[1:]]}}}
    answer = json.loads(run("--limit", "peak<=125", "--json", table=table).stdout)
    assert answer["choice"] == {"blocks.0.q": "w8", "blocks.0.k": "w2", "blocks.0.up": "w8"}
    assert answer["resources"]["peak"] == 125
    assert set(answer["shadow_prices"]) == {"bytes[peak 0]", "bytes[peak 1]"}
    for wrong in ("peak>=100", "peak<=0.5 of range"):
        refused = run("--limit", wrong, table=table)
        assert refused.exit_code == 2
        assert "peak<=AMOUNT" in refused.stderr


def test_infeasible_is_data_and_exits_with_3(run: Run) -> None:
    result = run("--limit", "bytes<=70", "--json")
    assert result.exit_code == 3
    answer = json.loads(result.stdout)
    assert answer["status"] == "infeasible"
    assert answer["least_budget"] == {"bytes": 75}
    assert answer["choice"] is answer["objective"] is answer["gap"] is None
    assert answer["conflict"]["members"] == [
        {
            "kind": "limit",
            "name": "bytes",
            "fits": True,
            "limit": 70,
            "least": 75,
            "objective": pytest.approx(1.7),
        }
    ]
    words = run("--limit", "bytes<=70")
    assert words.exit_code == 3
    assert "no plan is within the limit on bytes" in words.stdout
    assert "bytes: 75 would fit" in words.stdout


def test_at_least_limits(run: Run) -> None:
    answer = json.loads(run("--limit", "bytes>=250", "--limit", "bytes<=260", "--json").stdout)
    assert answer["resources"]["bytes"] == 250
    assert run("--limit", "bytes>=301", "--json").exit_code == 3


def test_people_get_a_table_and_a_proof(run: Run) -> None:
    result = run("--limit", "5 bpw", "--verbose")
    assert result.exit_code == 0
    assert "blocks.0.up" in result.stdout
    assert "bound 0.5, gap " in result.stdout
    assert "lagrangian: optimal" in result.stderr


def test_metrics_are_named_when_there_are_several(run: Run) -> None:
    table = {
        **TABLE,
        "metrics": {**TABLE["metrics"], "top1": {"direction": "max", "values": [[1, 2, 3]] * 3}},
    }
    assert run(table=table).exit_code == 2
    answer = json.loads(run("--metric", "top1", "--limit", "bytes<=200", "--json", table=table).stdout)
    assert answer["objective"] == 7
    assert answer["bound"] >= answer["objective"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "bytes<=0"], "more than 0"),
        (["--limit", "bytes<=1e400"], "at most 2^63"),
        (["--limit", "lots"], "must be a resource"),
        (["--limit", "watts<=3"], "Known names: bytes, latency_ns, loss"),
        (["--pin", "blocks.0.qq=w2"], "Close names: blocks.0.q"),
        (["--pin", "blocks.9.*=w2"], "matches nothing"),
        (["--pin", "blocks.0.q"], "LAYER=SCHEME"),
        (["--pin", "blocks.0.up=w4"], "Offered: w2, w8"),
        (["--tie", "blocks.0.q"], "at least two layers"),
        (["--tie", "blocks.0.q,x"], "tied layer must be in the table"),
        (["--metric", "speed"], "metric must be in the table"),
        (["--gap", "-1"], "gap must be"),
        (["--time-limit", "0"], "time limit must be"),
        (["--objective", "best"], "objective must be one of sum, minimax"),
        (["--objective", "minimax: 3"], "minimax must stand alone"),
        (["--objective", "weighted: loss=-1"], "METRIC=NUMBER"),
        (["--objective", "weighted: loss=1, loss=2"], "each metric once"),
        (["--objective", "weighted: loss=0"], "more than 0"),
        (["--objective", "weighted"], "must name a metric"),
        (["--objective", "lexicographic: loss"], "at least 2 metrics"),
        (["--objective", "lexicographic: loss within some%, loss"], "METRIC within NUMBER%"),
        (["--objective", "uncertainty: nan"], "how many standard errors"),
        (["--objective", "uncertainty: 2"], "a standard error for every score of loss"),
        (["--objective", "worst: loss, speed"], "must be in the table. Got 'speed'"),
        (["--objective", "quadratic: -1"], "weight of the interactions from 0"),
        (["--objective", "quadratic"], "interactions in the table. Got none"),
        (["--objective", "rank_order: a, b"], "ordered by one metric"),
        (["--solver", "magic"], "solver must be one of auto, lagrangian"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_to_do(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("table", ["", "[]", '{"schema": "bitplan.table/9"}', "NaN"])
def test_what_is_no_table_exits_with_2(run: Run, table: str) -> None:
    assert run(table=table).exit_code == 2


def test_a_missing_file_exits_with_2(run: Run, tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(allocate)
    assert CliRunner().invoke(app, [str(tmp_path / "none.json")]).exit_code == 2


def test_no_plan_within_the_time_limit_exits_with_4(run: Run) -> None:
    primes = [10**13 + 37 * i * i + 11 * i for i in range(1, 120)]
    layers = [{"name": str(i), "parameters": 1} for i in range(38)]
    rows = [[primes[3 * i], primes[3 * i + 1] * 3, primes[3 * i + 2] * 7] for i in range(38)]
    total = sum(row[i % 3] for i, row in enumerate(rows)) + 1
    table = {
        **TABLE,
        "layers": layers,
        "metrics": {"loss": {"direction": "min", "values": [[3.0, 2.0, 1.0]] * 38}},
        "resources": {"x": rows},
    }
    result = run("--limit", f"x<={total},x>={total}", "--time-limit", "0.3", "--json", table=table)
    assert json.loads(result.stdout)["status"] == "unknown"
    assert result.exit_code == 4


def test_it_starts_without_torch() -> None:
    code = "import sys; import service.cli.allocate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
