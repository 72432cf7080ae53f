"""What blocks gave in earlier runs, kept in host memory within a bound: later runs begin behind them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only


class Prefixes:
    """Outputs of blocks by group (the same boundary of the same part) and number of the micro-batch.

    Beyond `bound` bytes the group that was used longest ago goes; a group never displaces itself, so of one
    that does not fit, the first micro-batches stay.
    """

    def __init__(self, bound: int) -> None:
        self._bound, self._held = bound, 0
        self._groups: OrderedDict[Hashable, dict[int, Any]] = OrderedDict()

    def __contains__(self, key: tuple[Hashable, int]) -> bool:
        group, number = key
        return number in self._groups.get(group, {})

    def get(self, group: Hashable, number: int, device: torch.device) -> Any:
        """A copy on the device, which the run may change. KeyError for what is not held."""
        self._groups.move_to_end(group)
        found = self._groups[group][number]
        return tree_map_only(Tensor, lambda value: value.to(device, copy=True), found)

    def put(self, group: Hashable, number: int, value: Any) -> None:
        """Keep a copy if there is room for it."""
        size = _bytes(value)
        self._make_room(group, size)
        if self._held + size <= self._bound and (group, number) not in self:
            self._groups.setdefault(group, {})[number] = tree_map_only(Tensor, _on_host, value)
            self._groups.move_to_end(group)
            self._held += size

    def clear(self) -> None:
        """Drop everything."""
        self._groups.clear()
        self._held = 0

    def _make_room(self, group: Hashable, size: int) -> None:
        for other in [name for name in self._groups if name != group]:
            if self._held + size <= self._bound:
                return
            self._held -= sum(map(_bytes, self._groups.pop(other).values()))


def _on_host(value: Tensor) -> Tensor:
    return value.to("cpu", copy=True)


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(value) if isinstance(leaf, Tensor))
