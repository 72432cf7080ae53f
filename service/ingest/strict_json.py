"""JSON from strangers: bounded in size and depth, no duplicate keys, no NaN, UTF-8 only, whole characters."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from service.errors import Unprocessable

DEEPEST = 32
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def parse_json(data: bytes, *, what: str, slug: str = "invalid-json", largest: int = 100_000_000) -> Any:
    """The value of a JSON text; raises Unprocessable with `slug` that names `what` and the fault.

    >>> parse_json(b'{"a": [1, 2]}', what="config.json")
    {'a': [1, 2]}
    """

    def fail(reason: str) -> Unprocessable:
        return Unprocessable(
            slug, f"{what} must be JSON (UTF-8, no duplicate keys, finite numbers). Got {reason}."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise fail(f"the key {name[:200]!r} twice")
        return members

    def constant(text: str) -> Any:
        raise fail(text)

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise fail(f"the number {text[:40]}, beyond double precision")
        return value

    if len(data) > largest:
        raise fail(f"{len(data)} bytes, more than {largest}")
    if depth_of(data) > DEEPEST:
        raise fail(f"more than {DEEPEST} nested levels")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=finite
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        raise fail(f"an invalid byte at {error.start}") from None
    except UnicodeEncodeError:
        raise fail("half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise fail(f"a syntax error: {error}") from None


def parse_object(
    data: bytes, *, what: str, slug: str = "invalid-json", largest: int = 100_000_000
) -> dict[str, Any]:
    """Like `parse_json`, and the value must be an object."""
    value = parse_json(data, what=what, slug=slug, largest=largest)
    if not isinstance(value, dict):
        raise Unprocessable(slug, f"{what} must be a JSON object. Got {type(value).__name__}.")
    return value


def depth_of(data: bytes) -> int:
    """The deepest nesting of brackets outside strings, counted before a recursive parser sees the text.

    >>> depth_of(b'{"a": [["]]]]"]]}')
    3
    """
    depth = deepest = 0
    for bracket in _STRING.sub(b"", data).translate(None, delete=_NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
