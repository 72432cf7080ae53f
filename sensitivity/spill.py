"""Tensors in files without names: pages that the system may write out and read again, no anonymous memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from sensitivity.errors import DiskFull

DISK_SHARE = 2
"""One part in so many of the free disk may hold spilled tensors."""
MOST_FILES = 2**14
"""A process may map a limited number of files (65,530): so many of weights, and so many of activations."""


def spilled(values: Tensor) -> Tensor:
    """A copy in host memory that is mapped from a file of its own, which ends with the tensor.

    Files are made in the folder that TMPDIR names. Raises DiskFull.

    >>> spilled(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0]]
    """
    if not values.numel():
        return values.detach().cpu()
    with tempfile.NamedTemporaryFile(prefix="bitplan-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, values.nbytes)
        except OSError as error:
            raise DiskFull(
                f"the folder of temporary files must have room for activations. Got {error.strerror} at"
                f" {values.nbytes:,} bytes in {tempfile.gettempdir()}. Free some, or let TMPDIR name a larger"
                " disk."
            ) from error
        mapped = torch.from_file(file.name, shared=True, size=values.numel(), dtype=values.dtype)
    with torch.no_grad():
        return mapped.view(values.shape).copy_(values.detach())


class DiskBudget:
    """Room for the spilled tensors of a session: half of the disk that is free when it begins. Each takes its
    bytes until nothing uses them any more.

    >>> disk = DiskBudget(total=100)
    >>> kept = disk.spilled(torch.zeros(20))
    >>> disk.held, disk.has_room(21)
    (80, False)
    >>> del kept
    >>> disk.held
    0
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = free_bytes() // DISK_SHARE if total is None else total
        self.held = 0
        self._cached: Callable[[], int] = int
        self._evict: Callable[[], bool] = bool

    def lend(self, cached: Callable[[], int], evict: Callable[[], bool]) -> None:
        """Let a cache hold what nobody else needs: `cached` are its bytes, `evict` drops its oldest tensor
        and says whether there was one.
        """
        self._cached, self._evict = cached, evict

    def has_room(self, size: int) -> bool:
        """Whether a cache may take so much more."""
        return self.held + size <= self.total

    @property
    def room(self) -> int:
        """What a measurement may take, in place of the cache."""
        return max(0, self.total - self.held + self._cached())

    def spilled(self, values: Tensor) -> Tensor:
        """As `spilled`; cached tensors make room. What must be kept may go beyond the budget, as far as the
        disk does. Raises DiskFull.
        """
        while not self.has_room(values.nbytes) and self._evict():
            pass
        found = self._made(values)
        if found.nbytes:
            self.held += found.nbytes
            dropped = weakref.finalize(found.untyped_storage(), self._take_back, found.nbytes)
            dropped.atexit = False
        return found

    def _made(self, values: Tensor) -> Tensor:
        while True:
            try:
                return spilled(values)
            except DiskFull:
                if not self._evict():
                    raise

    def _take_back(self, size: int) -> None:
        self.held -= size


def free_bytes() -> int:
    """Room for files in the folder that TMPDIR names."""
    return shutil.disk_usage(tempfile.gettempdir()).free
