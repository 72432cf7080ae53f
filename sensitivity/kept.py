"""What a session keeps of a part, if it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class KeptParts(Generic[Item]):
    """What `compute` gives of a part, micro-batch by micro-batch: kept where all of it fits in `bound` bytes,
    else computed as it is read.

    >>> kept = KeptParts(lambda part: iter(part), lambda item: 1, bound=2)
    >>> kept("ab"), [*kept("abc")]
    (['a', 'b'], ['a', 'b', 'c'])
    """

    def __init__(
        self, compute: Callable[[str], Iterator[Item]], size: Callable[[Item], int], bound: int
    ) -> None:
        self._compute, self._size, self._bound = compute, size, bound
        self._parts: dict[str, list[Item]] = {}
        self._too_large: set[str] = set()

    def __call__(self, part: str) -> Iterable[Item]:
        """The items of a part, in order."""
        if part in self._parts:
            return self._parts[part]
        if part in self._too_large:
            return self._compute(part)
        found: list[Item] = []
        held = 0
        for item in self._compute(part):
            held += self._size(item)
            if held > self._bound:
                self._too_large.add(part)
                return self._compute(part)
            found.append(item)
        self._parts[part] = found
        return found

    def forget(self) -> None:
        """Drop what is kept: it is computed again when it is needed."""
        self._parts.clear()
