"""How many event streams may be open at a time, of each client and in all."""

from __future__ import annotations

import threading
from collections import Counter

from service.errors import TooMany
from service.metrics import STREAMS

RETRY_SECONDS = "10"


class Slots:
    """How many streams are open, of each client and in all. For several threads at once."""

    def __init__(self, whole: int, each: int) -> None:
        self.whole, self.each = whole, each
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, who: str) -> None:
        """One more stream of this client. Raises TooMany."""
        with self._lock:
            if self._open[who] >= self.each:
                raise _too_many(f"A client must have at most {self.each} open event streams", self._open[who])
            if self._open.total() >= self.whole:
                raise _too_many(f"The service must have at most {self.whole} open event streams", self.whole)
            self._open[who] += 1
        STREAMS.inc()

    def give_back(self, who: str) -> None:
        """One stream less."""
        with self._lock:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]
        STREAMS.dec()

    @property
    def open(self) -> int:
        """Streams at this moment."""
        return self._open.total()


def _too_many(must: str, got: int) -> TooMany:
    detail = f"{must}. Got one more than {got}. Close one, or ask GET /v1/jobs/{{id}} with Prefer: wait=30."
    return TooMany("too-many-streams", detail, headers={"Retry-After": RETRY_SECONDS})
