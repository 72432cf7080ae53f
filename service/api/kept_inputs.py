"""The planning inputs of finished jobs, kept for the next budget: reading them takes longer than solving."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from service import metrics
from service.planning.inputs import PlanningInputs

MOST = 8


class KeptInputs:
    """The last few inputs, by what they were made from. For several threads at once."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = Lock()
        self._kept: OrderedDict[str, PlanningInputs] = OrderedDict()

    def get(self, key: str, make: Callable[[], PlanningInputs]) -> PlanningInputs:
        """The inputs of a key, made where they are not kept. Raises what `make` raises."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                metrics.KEPT_INPUTS.labels("hit").inc()
                return found
        metrics.KEPT_INPUTS.labels("miss").inc()
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made
