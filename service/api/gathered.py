"""Many questions in one statement: what is asked while one runs is asked together when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

Value = TypeVar("Value")
Question = tuple[str, "asyncio.Future[Value | None]"]


class Gathered(Generic[Value]):
    """Values by id, read on a thread of its own, one statement at a time.

    A question is answered by a statement that began after it was asked: an answer is never older than its
    question. An error is told to all whose question was in the statement, so ask only for what cannot make
    it fail for others. To be used in the event loop's thread.
    """

    def __init__(self, read: Callable[[Sequence[str]], Mapping[str, Value]]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gathered")
        self._asked: list[Question[Value]] = []
        self._running = False

    async def get(self, ident: str) -> Value | None:
        """The value of this id, or None. Raises what reading raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Value | None] = loop.create_future()
        self._asked.append((ident, future))
        if not self._running:
            self._running = True
            loop.call_soon(self._ask)  # behind the other requests that are ready now
        return await future

    def close(self) -> None:
        """End the thread, once nothing is asked any more."""
        self._thread.shutdown(wait=False)

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        self._running = bool(asked)
        if asked:
            idents = [ident for ident, _ in asked]
            reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read, idents)
            reading.add_done_callback(partial(self._tell, asked))

    def _tell(self, asked: Sequence[Question[Value]], reading: asyncio.Future[Mapping[str, Value]]) -> None:
        """Answer; who asked may be gone."""
        self._ask()
        error = reading.exception()
        for ident, future in asked:
            if future.done():
                continue
            if error is None:
                future.set_result(reading.result().get(ident))
            else:
                future.set_exception(error)
