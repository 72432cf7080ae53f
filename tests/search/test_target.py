from __future__ import annotations

import math

import numpy as np
import pytest

from search.target import TargetError, fewest, parse_target

GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl<=0.01", ("divergence", "<=", 0.01, "")),
        (" output_kl ≤ 1e-2 ", ("divergence", "<=", 0.01, "")),
        ("perplexity <= 12.5", ("perplexity", "<=", 12.5, "")),
        ("accuracy>=0.97", ("accuracy", ">=", 0.97, "")),
        ("accuracy within 0.5 points", ("accuracy", "<=", 0.5, "points")),
        ("accuracy within 1 point", ("accuracy", "<=", 1.0, "points")),
        ("perplexity within 2%", ("perplexity", "<=", 2.0, "%")),
        ("sqnr within 3 %", ("sqnr", "<=", 3.0, "%")),
    ],
)
def test_targets_are_read(text: str, expected: tuple[str, str, float, str]) -> None:
    target = parse_target(text)
    assert (target.name, target.relation, target.value, target.unit) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a quality with <=, >= or within"),
        ("kl", "must be a quality with"),
        ("beauty<=1", "must be on one of kl, output_kl"),
        ("kl>=0.01", "A target on kl must be <= a number"),
        ("accuracy<=0.9", "A target on accuracy must be >= a number"),
        ("kl<=0", "must be more than 0"),
        ("kl<=1e999", "must be more than 0"),
        ("kl within 1 %", "on a quality that full precision has"),
        ("perplexity within 2 points", "within points must be on one of accuracy; use %"),
        ("kl<=-1", "must be a quality with"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        parse_target(text)


def test_an_absolute_target_is_judged_by_the_mean_and_its_interval() -> None:
    values = np.array([0.008, 0.009, 0.010, 0.011])
    reading = parse_target("kl<=0.01").judge(values, np.zeros(4))
    assert reading.interval.mean == pytest.approx(0.0095)
    assert (reading.met, reading.sure) == (True, False)
    assert reading.excess == pytest.approx(0.95)
    assert parse_target("kl<=0.02").judge(values, np.zeros(4)).sure
    assert not parse_target("kl<=0.009").judge(values, np.zeros(4)).met


def test_points_are_hundredths_of_the_share_that_is_lost_in_pairs() -> None:
    full = np.array([1.0] * 97 + [0.0] * 3)
    plan = full.copy()
    plan[:2] = 0.0
    reading = parse_target("accuracy within 2 points").judge(plan, full)
    lost = full - plan
    assert reading.interval.mean == pytest.approx(2.0)
    assert reading.interval.stderr == pytest.approx(100 * lost.std(ddof=1) / 10)
    assert reading.interval.low < 2.0 < reading.interval.high
    assert (reading.met, reading.sure, reading.excess) == (True, False, pytest.approx(1.0))
    assert not parse_target("accuracy within 1.9 points").judge(plan, full).met
    assert parse_target("accuracy within 1 point").judge(full, plan).sure


def test_percents_of_perplexity_are_geometric() -> None:
    full = np.exp(GENERATOR.normal(2.0, 0.5, 50))
    plan = full * np.exp(GENERATOR.normal(0.02, 0.01, 50))
    reading = parse_target("perplexity within 3 %").judge(plan, full)
    mean = 100 * (math.exp(np.log(plan).mean()) / math.exp(np.log(full).mean()) - 1)
    assert reading.interval.mean == pytest.approx(mean)
    assert reading.interval.low < mean < reading.interval.high
    assert reading.met
    higher = parse_target("sqnr within 5 %").judge(full * 0.96, full)
    assert higher.interval.mean == pytest.approx(4.0)
    assert higher.met
    assert not parse_target("sqnr within 3.9 %").judge(full * 0.96, full).met


def test_what_full_precision_does_not_reach_is_beyond_reach() -> None:
    full = np.array([1.0, 0.0, 1.0, 1.0])
    reading = parse_target("accuracy>=0.9").judge(full, full)
    assert (reading.met, reading.excess) == (False, math.inf)
    half = parse_target("accuracy>=0.5").judge(np.array([1.0, 0.0, 1.0, 0.0]), full)
    assert (half.met, half.excess) == (True, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 200])
def test_bisection_finds_the_first_size_with_few_tries(count: int) -> None:
    for first in range(count):
        tried: list[int] = []

        def met(size: int, first: int = first, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size >= first

        assert fewest(count, met) == first
        assert len(tried) <= 2 + math.log2(count)
        assert len(set(tried)) == len(tried)
    assert fewest(count, lambda size: False) is None
    assert fewest(0, lambda size: True) is None
