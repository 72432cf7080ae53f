from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import BudgetError, Limit, parse_budget, parse_limit, parse_limits


@pytest.mark.parametrize(
    ("text", "resource", "relation", "value"),
    [
        ("3.5 bpw", "bits_per_weight", "<=", Fraction(7, 2)),
        ("4.25bpw", "bits_per_weight", "<=", Fraction(17, 4)),
        ("7 GiB", "bytes", "<=", 7 * 2**30),
        ("2.5 MB", "bytes", "<=", 2_500_000),
        ("1 GB", "bytes", "<=", 10**9),
        ("1 kB", "bytes", "<=", 1000),
        ("12 ms", "latency_ns", "<=", 12_000_000),
        ("bytes<=123456", "bytes", "<=", 123456),
        ("bytes <= 2 MiB", "bytes", "<=", 2 * 2**20),
        ("kv_bytes<=1 KiB", "kv_bytes", "<=", 1024),
        ("latency<=12 us", "latency_ns", "<=", 12_000),
        ("latency<=12 µs", "latency_ns", "<=", 12_000),
        ("latency_ns<=12.5", "latency_ns", "<=", Fraction(25, 2)),
        ("latency_ns<=0.1 s", "latency_ns", "<=", 10**8),
        ("prefill<=1 ms", "prefill_ns", "<=", 10**6),
        ("bpw<=3", "bits_per_weight", "<=", 3),
        ("bits_per_weight>=2.1", "bits_per_weight", ">=", Fraction(21, 10)),
        ("bops<=4e9", "bops", "<=", 4 * 10**9),
        ("x>=0.1", "x", ">=", Fraction(1, 10)),
        ("x≥3", "x", ">=", 3),
        ("bytes<=9223372036854775808", "bytes", "<=", 2**63),
    ],
)
def test_limits_are_read_exactly(text: str, resource: str, relation: str, value: Fraction) -> None:
    assert parse_limit(text) == Limit(resource, relation, Fraction(value))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("bytes<=0.25 of range", Fraction(1, 4)), ("bops<=75% of range", Fraction(3, 4)), ("x>=0 of range", 0)],
)
def test_parts_of_the_range(text: str, ratio: Fraction) -> None:
    limit = parse_limit(text)
    assert limit.of_range
    assert limit.value == ratio


@pytest.mark.parametrize(
    ("text", "resource", "relation"),
    [
        ("uniform w4", "bytes", "<="),
        ("bytes<=uniform w4", "bytes", "<="),
        ("bpw <= uniform w4", "bits_per_weight", "<="),
        ("latency>=uniform w4", "latency_ns", ">="),
    ],
)
def test_the_total_of_a_uniform_scheme_can_be_the_limit(text: str, resource: str, relation: str) -> None:
    limit = parse_limit(text)
    assert (limit.resource, limit.relation, limit.uniform) == (resource, relation, "w4")
    assert parse_limit(str(limit)) == limit


def test_commas_mean_and() -> None:
    budget = parse_budget(" bytes<=2 MiB,latency<=12 ms ")
    assert budget.text == "bytes<=2 MiB,latency<=12 ms"
    assert [limit.resource for limit in budget.limits] == ["bytes", "latency_ns"]
    assert parse_limits(["1 bpw", "2 MB,3 ms"]) == tuple(map(parse_limit, ["1 bpw", "2 MB", "3 ms"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must not be empty"),
        ("3.5", "must end in a unit"),
        ("bytes", "must be a resource"),
        ("bytes<2", "must be a resource"),
        ("bytes==2", "must be a resource"),
        ("bytes<=", "must be a resource"),
        ("bytes<=nan", "must be a resource"),
        ("bytes<=inf", "must be a resource"),
        ("bytes<=0x10", "must be a resource"),
        ("bytes<=0", "more than 0"),
        ("bytes<=-5", "more than 0"),
        ("0 bpw", "more than 0"),
        ("bytes<=1e400", "at most 2\\^63"),
        ("bytes<=1e999999999", "at most 2\\^63"),
        ("bytes<=1e-999999999", "more than 0"),
        ("bytes<=9223372036854775809", "at most 2\\^63"),
        ("8388608 TiB,1e30 GiB", "at most 2\\^63"),
        ("bytes<=3 ms", "must be one of B"),
        ("latency_ns<=3 MB", "must be one of ns"),
        ("bpw<=3 MB", "must be one of bpw"),
        ("bops<=3 MB", "no unit"),
        ("bytes<=1.5 of range", "from 0 to 1"),
        ("bytes<=50%", "of range"),
        ("0.5 of range", "must name its resource"),
        ("bytes<=2 MiB,", "must be a resource"),
        ("bytes<=2 MB of range", "ratio or a percentage"),
        ("3,5 bpw", "must end in a unit"),
    ],
)
def test_what_cannot_mean_anything_is_refused(text: str, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        parse_budget(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        limits = parse_budget(text).limits
    except BudgetError:
        limits = ()
    assert all(limit.of_range or limit.value > 0 for limit in limits)


@given(st.decimals(min_value="0.0001", max_value="1e15", allow_nan=False))
def test_decimals_are_kept_to_the_last_digit(number: object) -> None:
    assert parse_limit(f"x<={number}").value == Fraction(str(number))
