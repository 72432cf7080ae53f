from __future__ import annotations

import pytest

from service.errors import Unprocessable
from service.ingest.strict_json import DEEPEST, depth_of, parse_json, parse_object


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "beyond double precision"),
        (b'{"a": ', "syntax error"),
        (b'{"a": "\xff"}', "invalid byte at 7"),
        (b"[" * 100 + b"]" * 100, "nested levels"),
        (b"[" * 1_000_000, "nested levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "syntax error"),
    ],
)
def test_anything_that_is_not_plain_json_is_refused(data, reason):
    with pytest.raises(Unprocessable, match=r"config.json must be JSON") as caught:
        parse_json(data, what="config.json")
    assert reason in caught.value.detail


def test_size_is_bounded():
    with pytest.raises(Unprocessable, match=r"more than 10"):
        parse_json(b"[1,2,3,4,5,6]", what="x", largest=10)


def test_an_object_is_asked_for():
    with pytest.raises(Unprocessable, match=r"must be a JSON object. Got list"):
        parse_object(b"[]", what="config.json")


@pytest.mark.parametrize("text", [b'"[[["', b'"\\"[["', b'{"a\\\\": "["}'])
def test_brackets_inside_strings_do_not_count(text):
    assert depth_of(text) == text.count(b"{")


def test_the_deepest_allowed_text_passes():
    data = b"[" * DEEPEST + b"]" * DEEPEST
    assert depth_of(data) == DEEPEST
    parse_json(data, what="x")
