"""Hearing early that the process is to stop: servers tell the application only once all answers are sent."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def calling_at_stop(action: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM call `action` in the event loop before the server's own
    handler.

    To be used in the event loop's thread; without effect in threads other than the main one, which get no
    signals, and for signals that the server does not handle.
    """
    loop = asyncio.get_running_loop()
    former: dict[int, Callable[[int, FrameType | None], object]] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(action)
        former[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                former[number] = handler
                signal.signal(number, stop)
    try:
        yield
    finally:
        for caught, handler in former.items():
            if signal.getsignal(caught) is stop:
                signal.signal(caught, handler)
