"""The thread that keeps a lease alive while the handler works."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

import structlog

from service.db.repositories.leases import LeaseLost

log = structlog.get_logger()


@contextmanager
def beating(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `beat` every `seconds` in a thread until the block ends or the lease is lost; other errors are
    tried again.
    """
    done, here = threading.Event(), copy_context()
    thread = threading.Thread(
        target=here.run, args=(_beat, beat, seconds, done), name="heartbeat", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(beat: Callable[[], None], seconds: float, done: threading.Event) -> None:
    while not done.wait(seconds):
        try:
            beat()
        except LeaseLost:
            return
        except Exception as error:
            log.warning("heartbeat.failed", error=str(error))
