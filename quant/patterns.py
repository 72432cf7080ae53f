"""Patterns over layer names: `*` matches any run of characters (dots too), `?` exactly one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PatternError(ValueError):
    """A pattern that matches nothing."""


def matches(pattern: str, name: str) -> bool:
    """Whether the whole name matches; steps are at most len(pattern) * len(name), for any number of stars.

    >>> matches("model.layers.*.mlp.*", "model.layers.0.mlp.up_proj")
    True
    >>> matches("h.?.attn", "h.10.attn")
    False
    """
    at = position = 0
    star = resume = -1
    while position < len(name):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", name[position]):
            at += 1
            position += 1
        elif star >= 0:
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return all(rest == "*" for rest in pattern[at:])


def select(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Names that match at least one pattern, in the order of `names`.

    >>> select(["*.q"], ["a.q", "a.k", "b.q"])
    ('a.q', 'b.q')

    Raises PatternError for a pattern that matches nothing.
    """
    known = tuple(names)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [name for name in known if matches(pattern, name)]
        if not hits:
            raise PatternError(_nothing(pattern, known))
        chosen.update(hits)
    return tuple(name for name in known if name in chosen)


def _nothing(pattern: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
    hint = f"Names are like {', '.join(close)}." if close else "There are no names."
    return f"Pattern must match at least one layer. Got {pattern!r}, which matches nothing. {hint}"
