"""`bitplan correlate` on a tiny model: what it reports is what can be measured by hand, and nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from scipy.stats import kendalltau, spearmanr

from sensitivity.session import Session
from sensitivity.units import BlockUnit, MeasureUnit, ScoreUnit

Tiny = Callable[[str], Any]
Answer = Callable[..., Any]
OPTIONS = ("--schemes", "w2,w4,w8", "--samples", "8", "--plans", "8")
METRICS = ("--metric", "output_kl", "--metric", "sqnr", "--metric", "fisher")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every unit that sessions of this process run, with its result."""
    seen: list[Any] = []
    run = Session.run

    def keeping(session: Session, unit: Any) -> Any:
        result = run(session, unit)
        seen.append((unit, result))
        return result

    monkeypatch.setattr(Session, "run", keeping)
    return seen


def row(found: Any, score: str, kind: str) -> Any:
    [budget] = found["budgets"]
    [one] = [r for r in budget["correlations"] if (r["score"], r["plans"]) == (score, kind)]
    return one


def test_coefficients_are_those_of_the_measured_plans(
    answer: Answer, tiny: Tiny, units: list[Any], tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = ("correlate", model.folder, "-c", model.data, "-b", "5 bpw", "--data-dir", tmp_path, *OPTIONS)
    found = answer(*ask, *METRICS, "--no-interactions")
    scores = {
        (metric.layer, metric.scheme, metric.metric): metric.value
        for unit, result in units
        if isinstance(unit, ScoreUnit)
        for metric in result.scores
    }
    measured = [(unit, result) for unit, result in units if isinstance(unit, MeasureUnit)]
    assert {unit.part for unit, _ in measured} == {"choosing"}
    assert len(measured) == found["budgets"][0]["plans"]["all"]["count"]
    means = [np.mean(result.arrays["divergence"]) for _, result in measured]
    for metric, sign in (("output_kl", 1), ("sqnr", -1)):
        sums = [
            sign * sum(scores[layer, scheme, metric] for layer, scheme in unit.assignment)
            for unit, _ in measured
        ]
        told = row(found, metric, "all")
        assert told["spearman"]["value"] == pytest.approx(spearmanr(sums, means).statistic)
        assert told["kendall"]["value"] == pytest.approx(kendalltau(sums, means).statistic)
    assert found["budgets"][0]["plans"]["random"]["count"] == 8
    judged = {one["name"]: one for one in found["scores"]}
    spent = sum(result.facts["forwards"] for unit, result in units if isinstance(unit, BlockUnit))
    assert judged["fisher"]["forwards"] == pytest.approx(spent)
    assert all(0 <= one["stability"] <= 1 and 0 <= one["resolved"] <= 1 for one in judged.values())


@pytest.mark.slow
def test_options_that_a_job_has_decided_are_refused_by_name(bitplan: Callable[..., Result]) -> None:
    refused = bitplan(
        "correlate", "job_1", "-b", "4 bpw", "--seed", "0", "-c", "data.txt", "--no-interactions"
    )
    assert refused.exit_code == 2
    for name in ("--seed", "--calibration", "--no-interactions"):
        assert name in refused.stderr
    assert "--plans may differ" in refused.stderr
    taken = bitplan("correlate", "job_1", "-b", "4 bpw", "--plans", "9", "--server", "http://127.0.0.1:9")
    assert (taken.exit_code, "may differ" in taken.stderr) == (1, False)


def test_the_quadratic_models_are_judged_and_nothing_is_measured_twice(
    answer: Answer, bitplan: Callable[..., Result], tiny: Tiny, units: list[Any], tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = (model.folder, "-c", model.data, "-b", "5 bpw", "--data-dir", tmp_path, *OPTIONS)
    first = answer("correlate", *ask)
    assert [one["name"] for one in first["scores"]] == [
        "output_kl",
        "gram_output",
        "gram_output, quadratic",
        *(f"output_kl + {weight} gram_output" for weight in ("0.25", "0.5", "1")),
    ]
    assert {plan["source"] for plan in first["budgets"][0]["solver_plans"]} >= {
        "additive output_kl",
        "quadratic 0.5",
        "uniform w4",
    }
    units.clear()
    assert answer("correlate", *ask) == first
    assert units == []
    more = answer("correlate", *ask, "--metric", "output_kl", "--metric", "weight_error", "--no-interactions")
    assert Counter(type(unit).__name__ for unit, _ in units)["MeasureUnit"] <= 1  # weight_error's own plan
    about = {one["name"]: one for one in more["scores"]}
    assert about["output_kl"]["forwards"] > about["weight_error"]["forwards"] == 0
    assert 0 <= about["output_kl"]["stability"] <= 1
    assert about["weight_error"]["stability"] is about["weight_error"]["resolved"] is None
    assert row(more, "output_kl", "random") == row(first, "output_kl", "random")
    units.clear()
    everything = answer("correlate", *ask)
    assert {"weight_error", "gram_output"} <= {one["name"] for one in everything["scores"]}
    assert {type(unit) for unit, _ in units} <= {MeasureUnit}
    table = bitplan("correlate", *ask).stdout
    for words in ("5 bpw: rank correlation with 8 random and 8 near plans", "weight_error", "Kendall"):
        assert words in table


def test_what_auto_picks_is_judged(answer: Answer, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("resnet")
    ask = ("correlate", model.folder, "-c", model.data, "-b", "5 bpw", "--data-dir", tmp_path, *OPTIONS)
    found = answer(*ask, "--metric", "auto")
    assert "auto" not in {one["name"] for one in found["scores"]}
    assert row(found, found["scores"][0]["name"], "random")["spearman"] is not None
    assert answer(*ask)["scores"]


def test_an_interrupted_run_goes_on(
    bitplan: Callable[..., Result],
    answer: Answer,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = tiny("resnet")
    ask = ("correlate", model.folder, "-c", model.data, "-b", "5 bpw", "--data-dir", tmp_path, *OPTIONS)
    run, keys = Session.run, Counter[str]()

    def failing(session: Session, unit: Any) -> Any:
        keys[unit.key] += 1
        if sum(key.startswith("measure") for key in keys) == 5:
            raise KeyboardInterrupt
        return run(session, unit)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", failing)
        result = bitplan(*ask)
        assert result.exit_code == 130
        assert "run the same command again" in result.stderr
    before = dict(keys)

    def counting(session: Session, unit: Any) -> Any:
        keys[unit.key] += 1
        return run(session, unit)

    monkeypatch.setattr(Session, "run", counting)
    answer(*ask)
    repeated = {key for key in before if keys[key] > before[key]}
    assert len(repeated) <= 1
    assert all(count <= 2 for count in keys.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--plans", "3"), "--plans: Input should be greater than or equal to 8. Got 3"),
        (("--metric", "nonsense"), "A metric must be one of auto, output_kl"),
        (("-b", "much"), "much"),
    ],
)
def test_bad_input_is_refused(
    bitplan: Callable[..., Result], tiny: Tiny, options: tuple[str, ...], words: str
) -> None:
    model = tiny("resnet")
    result = bitplan("correlate", model.folder, "-c", model.data, "-b", "5 bpw", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_model_must_come_with_data(bitplan: Callable[..., Result], tiny: Tiny) -> None:
    result = bitplan("correlate", tiny("resnet").folder, "-b", "5 bpw")
    assert result.exit_code == 2
    assert "Add --calibration FILE" in result.stderr


def test_a_budget_that_nothing_fits_has_no_plans(answer: Answer, bitplan: Any, tiny: Tiny) -> None:
    model = tiny("resnet")
    ask = ("correlate", model.folder, "-c", model.data, "-b", "1 bpw", *OPTIONS)
    [budget] = answer(*ask, code=3)["budgets"]
    assert (budget["status"], budget["correlations"]) == ("infeasible", [])
    assert budget["least_budget"]["bits_per_weight"] > 1
    assert "1 bpw: no plan fits; the least budget is" in bitplan(*ask).stdout


@pytest.mark.parametrize("asked", [("--metric", "metric_decoupled"), ("--contexts", "each")])
def test_scores_that_are_not_of_one_metric_and_all_samples_are_refused(
    bitplan: Callable[..., Result], tiny: Tiny, tmp_path: Path, asked: tuple[str, str]
) -> None:
    model = tiny("resnet")
    ask = ("correlate", model.folder, "-c", model.data, "-b", "5 bpw", "--data-dir", tmp_path, *OPTIONS)
    found = bitplan(*ask, *asked)
    assert found.exit_code == 2
    assert "Correlations must be of metrics that score every layer on all samples" in found.stderr
