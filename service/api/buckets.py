"""Rate limits: a token bucket per name, in this process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MOST = 10_000


class Buckets:
    """Each name may do `burst` things at once and `per_second` in the long run; 0 per second: no limit.

    Only the `MOST` names that came last are remembered. For one thread.

    >>> seconds = iter([0.0, 0.0, 0.0, 0.5])
    >>> buckets = Buckets(2.0, 2, lambda: next(seconds))
    >>> [buckets.take("key") for _ in range(4)]
    [0.0, 0.0, 0.5, 0.0]
    """

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst = per_second, burst
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> float:
        """0 where the name may do one more thing, which is counted; else the seconds until it may."""
        if not self.per_second:
            return 0.0
        level, now = self._level(name)
        if level < 1:
            return (1 - level) / self.per_second
        self._levels[name] = (level - 1, now)
        self._levels.move_to_end(name)
        if len(self._levels) > MOST:
            self._levels.popitem(last=False)
        return 0.0

    def wait(self, name: str) -> float:
        """The seconds until the name may do one more thing, without counting one."""
        level, _ = self._level(name)
        return (1 - level) / self.per_second if self.per_second and level < 1 else 0.0

    def _level(self, name: str) -> tuple[float, float]:
        now = self._clock()
        level, at = self._levels.get(name, (self.burst, now))
        return min(self.burst, level + (now - at) * self.per_second), now
