"""`bitplan run` and everything that one may ask it for, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import text

from quant.plan import parse_plan
from sensitivity.session import Session
from service.cli.output import JobProgress
from service.cli.run import memory_words
from service.db.engine import Database

ROOT = Path(__file__).parents[3]
Tiny = Callable[[str], Any]
Answer = Callable[..., Any]
Few = tuple[str, ...]
UNSEEDED = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))\n"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of unit was run in this process."""
    counts: Counter[str] = Counter()
    run = Session.run

    def counting(session: Session, unit: Any) -> Any:
        counts[type(unit).__name__] += 1
        counts[unit.key] += 1
        return run(session, unit)

    monkeypatch.setattr(Session, "run", counting)
    return counts


def test_a_table_a_proof_and_a_file(
    bitplan: Callable[..., Result], tiny: Tiny, few: Few, tmp_path: Path
) -> None:
    model = tiny("resnet")
    out = tmp_path / "deep" / "plan.json"
    fresh = ("--seed", "41")  # no other test has stored what is measured here
    result = bitplan("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, *fresh, "-o", out)
    assert result.exit_code == 0, result.stderr
    for words in ("full precision", "uniform w4", "plan 5 bpw", "optimal", f"wrote {out}"):
        assert words in result.stdout
    assert re.search(
        r"work: [\d,]+ forward passes of one sample \(choosing .*\); estimated [\d,]+", result.stdout
    )
    plan = parse_plan(out.read_bytes())
    assert plan.totals.bits_per_weight <= 5
    assert set(plan.assignment.values()) <= {"w2", "w4", "w8"}


def test_auto_says_what_it_picked_and_a_time_must_be_one(
    bitplan: Callable[..., Result], tiny: Tiny, few: Few
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--metric", "auto")
    found = bitplan(*ask, "--dry-run", "--time-budget", "10min")
    assert "the most trusted that fits" in found.stdout
    refused = bitplan(*ask, "--time-budget", "soon")
    assert refused.exit_code == 2
    assert "must be a number with s, min or h" in refused.stderr
    both = bitplan(*ask, "--refine-metric", "output_kl")
    assert both.exit_code == 2
    assert "auto must stand alone" in both.stderr


def test_the_same_again_measures_nothing_and_prints_json_only(
    answer: Answer, tiny: Tiny, few: Few, measured: Counter[str], tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "--calibration", model.data, "--budget", "5 bpw", *few)
    first = answer(*ask, "-o", tmp_path / "a.json")
    measured.clear()
    second = answer(*ask, "-o", tmp_path / "b.json")
    assert measured == {}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert first[0]["digest"] == second[0]["digest"]
    assert second[0]["evidence"]["part"] == "reporting"


def test_several_budgets_fill_a_folder_and_limits_hold_for_all(
    answer: Answer, tiny: Tiny, few: Few, tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, *few, "-b", "5 bpw", "-b", "bytes<=1 MiB")
    plans = answer(*ask, "--limit", "7 bpw", "--limit", "bops<=1e15", "-o", tmp_path / "plans")
    assert [plan["budget"] for plan in plans] == ["5 bpw", "bytes<=1 MiB"]
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == [
        "5-bpw.plan.json",
        "bytes-at-most-1-MiB.plan.json",
    ]
    assert all(plan["resources"]["bits_per_weight"] <= 7 for plan in plans)


def test_a_pinned_head_takes_part_and_ties_hold(answer: Answer, tiny: Tiny, few: Few) -> None:
    model = tiny("llama")
    tied = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    ask = ("run", model.folder, "-c", model.data, "-b", "6 bpw", *few, "--sequence-length", "12")
    forbidden = ("--forbid", "*.0.mlp.*=w2,w8")
    [plan] = answer(
        *ask, "--pin", "lm_head=w6", "--tie", ",".join(tied), "--exclude", "*.1.mlp.*", *forbidden
    )
    layers = plan["document"]["layers"]
    assert layers["lm_head"]["weight_bits"] == 6
    assert len({layers[name]["scheme"] for name in tied}) == 1
    assert not [name for name in layers if ".1.mlp." in name]
    assert {layer["scheme"] for name, layer in layers.items() if ".0.mlp." in name} == {"w4"}


def test_embeddings_can_be_included(answer: Answer, tiny: Tiny, few: Few) -> None:
    model = tiny("llama")
    ask = ("run", model.folder, "-c", model.data, "-b", "4 bpw", *few, "--sequence-length", "12", "--dry-run")
    without, included = answer(*ask), answer(*ask, "--include", "*embed_tokens")
    assert included["layers"] == without["layers"] + 1
    assert {item["name"] for item in without["excluded"]} == {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_latency_tables(
    answer: Answer, tiny: Tiny, few: Few, kind: str, tmp_path: Path, bitplan: Callable[..., Result]
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, *few)
    names = list(answer(*ask, "-b", "5 bpw")[0]["document"]["layers"])
    rows = {name: {"w2": 100, "w4": 200.5, "w8": 400} for name in names}
    table = tmp_path / f"latency.{kind}"
    cells = [f"{name},{scheme},{value}" for name, row in rows.items() for scheme, value in row.items()]
    lines = ["layer,scheme,latency_ns", *cells]
    table.write_text(json.dumps(rows) if kind == "json" else "\n".join(lines))
    budget = f"latency<={len(names) * 0.15} us"
    [plan] = answer(*ask, "-b", budget, "--latency-table", table)
    assert plan["resources"]["latency_ns"] <= len(names) * 150
    refused = bitplan(*ask, "-b", budget)
    assert refused.exit_code == 2
    assert "latency" in refused.stderr


@pytest.mark.slow
def test_several_metrics_and_a_task(answer: Answer, tiny: Tiny, few: Few) -> None:
    model = tiny("resnet")
    [plan] = answer(
        "run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--metric", "sqnr", "--metric", "fisher",
        "--task", "image_classification", "--seed", "3", "--device", "cpu", "--time-limit", "5", "--gap",
        "1e-6", "--batch-size", "4", "--no-interactions",
    )  # fmt: skip
    assert plan["metric"] == "sqnr"
    sources = {candidate["source"] for candidate in plan["candidates"]}
    assert not [source for source in sources if source.startswith("quadratic")]


def test_a_factory_of_the_current_directory(
    answer: Answer, tiny: Tiny, few: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "models.py").write_text((tiny("mlp").data.parent / "tiny_factory.py").read_text())
    monkeypatch.chdir(tmp_path)
    ask = ("run", "--factory", "mine.models:build", "-c", tiny("mlp").data, "-b", "5 bpw", *few)
    [plan] = answer(*ask, "-o", "plan.json")
    assert plan["evidence"]["measure"] == "relative_squared_error"
    shown = answer(
        "evaluate", "--factory", "mine.models:build", "--plan", "plan.json", "--data", tiny("mlp").data
    )
    assert shown["plan"]["divergence"]["mean"] > shown["full_precision"]["divergence"]["mean"] == 0


def test_a_factory_must_give_the_same_weights_each_time(
    bitplan: Callable[..., Result], tiny: Tiny, few: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unseeded.py").write_text(UNSEEDED)
    monkeypatch.chdir(tmp_path)
    result = bitplan("run", "--factory", "unseeded:build", "-c", tiny("mlp").data, "-b", "5 bpw", *few)
    assert result.exit_code == 2
    assert "must return the same weights" in result.stderr


def test_a_dry_run_says_what_and_stores_nothing(
    answer: Answer, bitplan: Callable[..., Result], tiny: Tiny, few: Few, tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--dry-run")
    found = answer(*ask, "--data-dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    layers, samples = found["layers"], found["samples"]["scoring"]
    assert found["choices"] == 3 * layers
    assert found["scores"] == {"wanted": 6 * layers, "stored": 0}
    assert found["reuse"]["blocks"] == 2
    assert 0 < found["reuse"]["share"] < 1
    most = samples * (1 + 3 * layers) + 8 * layers
    assert 3 * layers * samples * found["reuse"]["share"] < found["forwards"]["scoring"] < most
    assert "output head" in found["excluded"][0]["reason"]
    assert found["seconds"] > 0
    assert found["bytes_per_worker"] > 2**20
    words = bitplan(*ask, "--data-dir", tmp_path / "new").stdout
    for expected in (
        "output head",
        "forward passes, scoring",
        "per worker",
        "of which 0 are stored",
        "first of 2 blocks",
    ):
        assert expected in words


def test_a_dry_run_says_what_a_memory_limit_does(
    answer: Answer, bitplan: Callable[..., Result], tiny: Tiny, few: Few
) -> None:
    model = tiny("llama")
    ask = ("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--sequence-length", "12", "--dry-run")
    found = answer(*ask, "--memory-limit", "4096 GiB")
    memory = found["memory"]
    assert found["bytes_per_worker"] < memory["limit"] == 2**42
    assert memory["mapped"] > 0
    assert memory["streamed"] is False
    assert memory["gradients"]["blocks"] == 2
    assert "nothing is streamed" in bitplan(*ask, "--memory-limit", "4 TiB").stdout
    for limit, words in (("lots", "must be a number with a unit"), ("1 MiB", "memory_limit must hold")):
        refused = bitplan(*ask, "--memory-limit", limit)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_streaming_is_told_in_words() -> None:
    gradients = {"whole": 2**31, "step": 2**28, "spilled": 2**24, "blocks": 22, "fault": None}
    memory = {"limit": 2**31, "loaded": 2**28, "mapped": 2**31, "streamed": True, "gradients": gradients}
    words = memory_words(memory)
    assert "gradients are streamed over 22 blocks, 256.0 MiB at a time, 16.0 MiB per sample in files" in words
    fault = {**gradients, "fault": "no blocks"}
    assert "cannot be streamed: no blocks" in memory_words({**memory, "streamed": False, "gradients": fault})


def test_a_dry_run_says_which_budgets_cannot_be_met(
    answer: Answer, bitplan: Callable[..., Result], tiny: Tiny, few: Few
) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, "-b", "5 bpw", "-b", "1 bpw", *few, "--dry-run")
    met, unmet = answer(*ask, code=3)["budgets"]
    assert (met["budget"], met["can_be_met"], met["least_budget"]) == ("5 bpw", True, {})
    assert (unmet["budget"], unmet["can_be_met"]) == ("1 bpw", False)
    least = unmet["least_budget"]["bits_per_weight"]
    assert 2 < least < 3
    shown = " ".join(bitplan(*ask).stdout.split())
    assert "budget 5 bpw" in shown
    assert f"no plan is within the limit on bits_per_weight; least budget: bits_per_weight {least:g}" in shown
    exact = ("run", model.folder, "-c", model.data, "-b", f"{least + 0.001:.3f} bpw", *few, "--dry-run")
    assert answer(*exact)["budgets"][0]["can_be_met"]


def test_progress_that_nobody_watches_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress() as bar:
        for done in (0, 1, 11, 19, 20, 200):
            progress = {"done": done, "total": 200, "eta_seconds": 75 if done == 20 else None}
            bar({"stage": "scoring", "progress": progress})
        bar({"stage": "measuring", "progress": {"done": 3, "total": 9}})
    lines = ["scoring 0/200", "scoring 20/200, 1:15 left", "scoring 200/200", "measuring 3/9"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_dry_run_counts_what_is_stored(answer: Answer, tiny: Tiny, few: Few) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, "-b", "5 bpw", *few)
    answer(*ask)
    found = answer(*ask, "--dry-run")
    assert found["scores"]["stored"] == found["scores"]["wanted"]
    assert found["forwards"]["scoring"] == 0
    more = answer(*ask, "--dry-run", "--schemes", "w2,w3,w4,w8", "--metric", "hessian_trace")
    assert 0 < more["scores"]["stored"] < more["scores"]["wanted"]


def test_infeasible_exits_with_3_and_says_what_would_fit(
    answer: Answer, bitplan: Callable[..., Result], tiny: Tiny, few: Few, tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = (
        "run",
        model.folder,
        "-c",
        model.data,
        *few,
        "-b",
        "1 bpw",
        "-b",
        "5 bpw",
        "-o",
        tmp_path / "plans",
    )
    plans = answer(*ask, code=3)
    assert [plan["status"] for plan in plans] == ["infeasible", "optimal"]
    assert plans[0]["least_budget"]["bits_per_weight"] > 2
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["5-bpw.plan.json"]
    result = bitplan(*ask)
    assert result.exit_code == 3
    assert "least budget: " in result.stdout


def test_a_crash_of_the_worker_exits_with_1(
    bitplan: Callable[..., Result], tiny: Tiny, few: Few, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(session: Session, unit: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Session, "run", crash)
    model = tiny("resnet")
    result = bitplan("run", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--seed", "77")
    assert result.exit_code == 1
    assert "memory" in result.stderr.lower()


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_next_run_goes_on(
    answer: Answer, tiny: Tiny, few: Few, measured: Counter[str], tmp_path: Path
) -> None:
    model = tiny("resnet")
    data = tmp_path / "data"
    ask = ["run", str(model.folder), "-c", str(model.data), "-b", "5 bpw", *few, "--data-dir", str(data)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli.main", *ask, "-o", str(tmp_path / "plan.json")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BITPLAN_EXECUTOR": "local_pool",
            "BITPLAN_WORKERS": "1",
            "BITPLAN_FAILPOINTS": "worker.before_unit:6=sleep:60",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stored = wait_for_scores(data / "bitplan.db", process)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same command again to go on" in told
    assert "Traceback" not in told
    assert not (tmp_path / "plan.json").exists()
    [plan] = answer(*ask)
    assert plan["status"] == "optimal"
    assert stored
    assert not [key for key in stored if measured[key]]
    assert measured["ScoreUnit"] > 0


def wait_for_scores(path: Path, process: subprocess.Popen[str]) -> set[str]:
    """The keys of the units that had scores when there were three of them."""
    deadline = time.monotonic() + 60
    keys: set[str] = set()
    while len(keys) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        keys = stored_keys(path)
    return keys


def stored_keys(path: Path) -> set[str]:
    if not path.exists():
        return set()
    database = Database(f"sqlite:///{path}")
    try:
        with database.engine.connect() as connection:
            found = connection.execute(text("SELECT name FROM sqlite_master WHERE name = 'scores'")).all()
            if not found:
                return set()
            return {row.unit_key for row in connection.execute(text("SELECT DISTINCT unit_key FROM scores"))}
    finally:
        database.close()
