"""What a user should know about what a worker saw, although the search goes on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def warnings_of(inspection: Mapping[str, Any]) -> list[str]:
    """Sentences, the first of a kind standing for all of them.

    >>> warnings_of({"experts": {"a.experts": [3, 0], "b.experts": [2, 1]}})[0]
    '1 of 4 experts saw no token of the scoring part, the first in a.experts. Send more or other data.'
    """
    counts: Mapping[str, list[int]] = inspection.get("experts") or {}
    unseen = {path: tokens.count(0) for path, tokens in counts.items() if 0 in tokens}
    if not unseen:
        return []
    total = sum(map(len, counts.values()))
    return [
        f"{sum(unseen.values())} of {total} experts saw no token of the scoring part, the first in"
        f" {next(iter(unseen))}. Send more or other data."
    ]
