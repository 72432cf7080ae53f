"""Memory of this process that no file stands behind, and what a limit on it leaves room for. Front: no torch.

Anonymous memory is what the system cannot drop and read again: pages of mapped weights and of spilled
activations do not count (RssAnon, proc(5)).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sensitivity.errors import MemoryLimitTooLow, SessionError

CACHE_BYTES = 2**30
"""What each cache of a session may hold where no limit is set."""
PIECE = 2**16
"""Weights that are taken to float32 at a time: what several schemes make of them stays in a core's cache."""
LOOK_SECONDS = 0.01
MARGIN = 32
"""One part in so many of a limit stays free, for what the allocator does not give back."""

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/maps")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE, _KEPT = 2**21, 2**24
"""Larger blocks are mapped and given back at once. Smaller ones, as pieces are, come from a heap that keeps
so much at its end: mapped anew each time, they would fault in page by page.
"""


def anonymous_bytes() -> int:
    """Resident memory of this process that no file stands behind.

    Raises SessionError where the system does not tell it.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration) as error:
        raise SessionError(
            f"a memory limit must be measured by RssAnon in {_STATUS} (Linux 4.5 or newer). Got none. "
            "Leave the limit out."
        ) from error
    return int(kilobytes) * 1024


def mapped_bytes(places: Iterable[tuple[int, int]]) -> int:
    """How much of some memory, as (address, bytes), is mapped from files."""
    ranges = [line.split(maxsplit=5) for line in _MAPS.read_text(encoding="utf-8").splitlines()]
    files = [tuple(int(end, 16) for end in row[0].split("-")) for row in ranges if row[4] != "0"]
    return sum(size for address, size in places if any(a <= address < b for a, b in files))


def hand_back_freed_memory() -> None:
    """Have the allocator give freed blocks back to the system at once instead of keeping them (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim() -> None:
    """Give back freed blocks between used ones (glibc), so that only what is used is counted."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class Peak:
    """The most anonymous memory while a block runs, looked at every few milliseconds and at its end."""

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, anonymous_bytes())


def watching(limit: int | None) -> AbstractContextManager[Peak | None]:
    """A `Peak` where there is a limit."""
    return nullcontext() if limit is None else Peak()


@dataclass(frozen=True)
class CacheBounds:
    """Bytes that each cache of a session may hold."""

    weights: int = CACHE_BYTES
    references: int = CACHE_BYTES
    prefixes: int = CACHE_BYTES
    outputs: int = CACHE_BYTES
    moments: int = CACHE_BYTES

    @classmethod
    def sharing(cls, room: int) -> CacheBounds:
        """So much for all of them."""
        return cls(*[room // 5] * 5)


@dataclass(frozen=True)
class MemoryUse:
    """What a session takes of its limit, as it measured when it began; all in bytes.

    limit     anonymous memory that may be used
    loaded    in use with model and data loaded
    mapped    weights that stay in their files
    forward   what a forward pass over one micro-batch adds
    largest   what quantizing the largest layer adds
    factors   what it adds more where the quantizer goes by inputs
    """

    limit: int
    loaded: int
    mapped: int
    forward: int
    largest: int
    factors: int

    def quantizing(self, *, by_inputs: bool) -> int:
        """What quantizing any layer adds."""
        return self.largest + (self.factors if by_inputs else 0)

    @property
    def available(self) -> int:
        """The limit less its margin."""
        return self.limit - self.limit // MARGIN

    @property
    def bounds(self) -> CacheBounds:
        """What is left for caches. Raises MemoryLimitTooLow."""
        needed = self.loaded + self.forward + self.largest
        self.require(needed, "one forward pass with one layer quantized")
        return CacheBounds.sharing(self.available - needed)

    def require(self, needed: int, what: str) -> None:
        """Raise MemoryLimitTooLow where the limit does not hold so much and its margin."""
        if needed > self.available:
            raise MemoryLimitTooLow(needed + self.limit - self.available, self.limit, what)

    def require_kept(self, peak: int, unit: str) -> None:
        """Raise MemoryLimitTooLow where a unit took more than the limit."""
        if peak > self.limit:
            raise MemoryLimitTooLow(peak, self.limit, f"what {unit} took")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class GradientUse:
    """What gradients of one sample take beside what is loaded; in bytes.

    whole     its graph through the whole model
    step      the most that one block, or what follows the blocks, takes forward and backward
    spilled   activations of a sample in files while it is streamed
    blocks    how many blocks there are to stream; 0 for none
    fault     why it cannot be streamed, None where it can
    """

    whole: int
    step: int
    spilled: int = 0
    blocks: int = 0
    fault: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)
