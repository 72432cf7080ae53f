import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.patterns import PatternError, matches, select

SHORT = st.text(alphabet="ab.*?", max_size=8)


def by_regular_expression(pattern, name):
    spelled = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(spelled, name, re.DOTALL) is not None


@given(SHORT, st.text(alphabet="ab.", max_size=10))
def test_agrees_with_a_regular_expression(pattern, name):
    assert matches(pattern, name) == by_regular_expression(pattern, name)


def test_brackets_are_ordinary_characters():
    assert matches("a[0]*", "a[0].q")
    assert not matches("a[0]", "a0")


def test_many_stars_end_at_once():
    assert not matches("*a" * 500 + "b", "a" * 2000)


def test_select_keeps_the_order_of_the_names():
    assert select(["*.k", "*.q"], ["x.q", "x.k", "x.v"]) == ("x.q", "x.k")
    assert select([], ["x.q"]) == ()


def test_a_pattern_that_matches_nothing_shows_close_names():
    with pytest.raises(PatternError, match=r"Got 'lm_haed'.*Names are like lm_head"):
        select(["lm_haed"], ["layers.0.q", "lm_head"])
    with pytest.raises(PatternError, match="There are no names"):
        select(["*"], [])
