"""Arrays of the blocks that a job has measured: read when they are asked for, the last ones kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

KEPT_BYTES = 2**28
"""Blocks of a large model take gigabytes together; what was read beyond this is read again."""

Arrays = Mapping[str, NDArray[Any]]


class Finished(Mapping[str, Arrays]):
    """Arrays by the key of their block; `read` gives those of an artifact."""

    def __init__(self, read: Callable[[str], Arrays]) -> None:
        self._read = read
        self._artifacts: dict[str, str | None] = {}
        self._joined: dict[str, Arrays] = {}
        self._kept: OrderedDict[str, Arrays] = OrderedDict()
        self._held = 0

    def __getitem__(self, key: str) -> Arrays:
        if key in self._joined:
            return self._joined[key]
        artifact = self._artifacts[key]
        if artifact is None:
            return {}
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._kept[key] = self._read(artifact)
        self._held += _bytes(found)
        while self._held > KEPT_BYTES:
            self._held -= _bytes(self._kept.popitem(last=False)[1])
        return found

    def __contains__(self, key: object) -> bool:
        return key in self._joined or key in self._artifacts

    def __iter__(self) -> Iterator[str]:
        yield from {**self._artifacts, **self._joined}

    def __len__(self) -> int:
        return len({**self._artifacts, **self._joined})

    def store(self, key: str, artifact: str | None) -> None:
        """A block whose arrays are an artifact, None for no arrays."""
        self._artifacts[key] = artifact

    def put(self, key: str, arrays: Arrays) -> None:
        """A block that was put together from parts of others."""
        self._joined[key] = arrays


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
