"""Who may take blobs away: everybody who adds or copies them shares a lock, whoever removes holds it alone.

A blob that is added again is made young under the shared lock, and removal looks at its age under the
exclusive one. So a file that somebody has just relied on is never removed, before any row names it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.store.durable import make_folder

PAUSE_SECONDS = 0.05


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock with others; waits for a removal, which takes microseconds."""
    make_folder(path.parent)
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(path: Path, patience_seconds: float) -> Iterator[bool]:
    """Hold the lock alone; False, and no lock, when others have held it for all of `patience_seconds`."""
    make_folder(path.parent)
    with _opened(path) as descriptor:
        yield _taken(descriptor, time.monotonic() + patience_seconds)


def _taken(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE_SECONDS)
        else:
            return True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of our own: its locks are told apart from those of other threads, and die with us."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
