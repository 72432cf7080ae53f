from __future__ import annotations

import math

import numpy as np
import pytest

from sensitivity.evidence import (
    MeasuredPlan,
    evidence_document,
    mean_interval,
    paired_difference,
    quality_interval,
    student_quantile,
)

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 30: 2.0423, 120: 1.9799, 100000: 1.9600}


@pytest.mark.parametrize(("freedom", "known"), TABLE.items())
def test_students_quantiles_are_the_printed_ones(freedom: int, known: float) -> None:
    assert student_quantile(freedom) == pytest.approx(known, abs=6e-5)


@pytest.mark.slow
def test_ninety_five_percent_of_intervals_hold_the_mean() -> None:
    chance = np.random.default_rng(0)
    intervals = [mean_interval(chance.normal(3.0, 2.0, 6)) for _ in range(2000)]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in intervals])
    assert 0.935 <= covered <= 0.965


def test_pairing_removes_what_samples_have_in_common() -> None:
    chance = np.random.default_rng(1)
    common = chance.normal(0, 10, 50)
    better, worse = common + chance.normal(0, 0.1, 50), common + 1 + chance.normal(0, 0.1, 50)
    interval = paired_difference(worse, better)
    assert 0.9 < interval.low < 1.0 < interval.high < 1.1


@pytest.mark.parametrize("values", [[1.0], [], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_bad_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 finite numbers"):
        mean_interval(values)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="same length"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    losses = np.array([1.0, 2.0, 4.0])
    interval, logs = quality_interval("perplexity", np.exp(losses)), mean_interval(losses)
    assert interval.mean == pytest.approx(math.exp(7 / 3))
    assert (interval.low, interval.high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    assert interval.stderr == pytest.approx(interval.mean * logs.stderr)


def measured(name: str, divergence: list[float], *, fits: bool = True) -> MeasuredPlan:
    values = np.array(divergence)
    return MeasuredPlan(name, 100, 4.0, fits, values, {"accuracy": np.array([1.0, 0.0, 1.0, 1.0])})


PLAN = measured("plan", [0.1, 0.2, 0.3, 0.4])
WORSE = measured("uniform w4", [0.2, 0.31, 0.4, 0.52])
SAME = measured("uniform w3", [0.3, 0.1, 0.2, 0.4])


def test_evidence_says_where_the_plan_is_better_for_certain() -> None:
    document = evidence_document("kl", PLAN, [WORSE], {"accuracy": np.ones(4)})
    assert document["verdict"] == {"beats_all_uniform": True, "rivals": ["uniform w4"]}
    assert document["samples"] == 4
    assert document["full_precision"]["quality"]["accuracy"]["mean"] == 1.0
    plan, rival = document["entries"]
    assert plan["difference"] is None
    assert rival["difference"]["low"] > 0
    assert rival["difference"]["mean"] == pytest.approx(
        rival["divergence"]["mean"] - plan["divergence"]["mean"]
    )


def test_a_rival_that_may_be_as_good_is_not_beaten() -> None:
    document = evidence_document("kl", PLAN, [WORSE, SAME], {})
    assert document["verdict"] == {"beats_all_uniform": False, "rivals": ["uniform w4", "uniform w3"]}


def test_rivals_beyond_the_limits_and_other_plans_do_not_count() -> None:
    large = measured("uniform w8", [0.0, 0.0, 0.0, 0.0], fits=False)
    other = measured("greedy", [0.0, 0.0, 0.0, 0.0])
    document = evidence_document("kl", PLAN, [WORSE, large, other], {})
    assert document["verdict"] == {"beats_all_uniform": True, "rivals": ["uniform w4"]}


def test_with_nothing_to_beat_nothing_is_claimed() -> None:
    assert evidence_document("kl", PLAN, [], {})["verdict"] == {"beats_all_uniform": False, "rivals": []}
