"""A point in time after which a solver must answer with what it has."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """Monotonic time, seconds; infinity for "no limit"."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The deadline that many seconds from now."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def at_least(self, seconds: float) -> Deadline:
        """This deadline, or that many seconds from now if that is later."""
        return Deadline(max(self.at, time.monotonic() + seconds))

    def left(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at
