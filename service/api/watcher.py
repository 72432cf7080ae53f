"""Waiting for jobs to change: one poller per process for all who wait, however many they are.

A stream or a long poll waits on a `Topic` and holds neither a connection nor a thread meanwhile. The poller
asks for all watched jobs in one statement, and reads each new event once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import structlog
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event

from service.api.job_resources import Event, Standing
from service.db.engine import Database
from service.db.repositories import events, jobs
from service.records import EventRecord, StandingRecord
from service.states import TERMINAL

POLL_SECONDS = 0.1
SHARE = 4
"""The poller rests this many times as long as its last look took."""
LONGEST_PAUSE_SECONDS = 5.0
TAIL = 32
"""The last events of a watched job that are kept; who is further behind reads the database."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Frame:
    """One event as it is sent; nothing follows the `last` one."""

    seq: int
    last: bool
    data: bytes


def frame_of(event: EventRecord) -> Frame:
    """The event on the wire: its number is the id, its type the name."""
    body = Event.of(event).model_dump_json()
    data = format_sse_event(data_str=body, event=event.type, id=str(event.seq))
    return Frame(event.seq, event.type in TERMINAL, data)


class Topic:
    """What is known of one watched job, shared by all who wait for it.

    `signal` is set and replaced at each change: take it, look, then wait for the one that was taken.
    `standing` is None until the first look; `gone` says that the job was deleted.
    """

    def __init__(self) -> None:
        self.signal = anyio.Event()
        self.standing: StandingRecord | None = None
        self.gone = False
        self.tail: deque[Frame] = deque(maxlen=TAIL)
        self.progress = b""
        self.waiting = 0

    @property
    def seq(self) -> int:
        """The number of the newest event in the tail."""
        return self.tail[-1].seq if self.tail else 0

    def update(self, standing: StandingRecord | None, news: Sequence[EventRecord]) -> None:
        """Take what a look has found, and wake everybody if it is new."""
        if standing is None:
            self.gone = True
        elif standing == self.standing and not news:
            return
        else:
            if news and news[0].seq != self.seq + 1:
                self.tail.clear()
            self.tail.extend(frame_of(event) for event in news)
            self.standing, self.progress = standing, _progress_frame(standing)
        self.wake()

    def wake(self) -> None:
        """Let everybody look."""
        self.signal.set()
        self.signal = anyio.Event()


class Watcher:
    """The topics of a process and the task that keeps them up to date, which runs while there are any.

    To be used in the event loop's thread.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._topics: dict[str, Topic] = {}
        self._task: asyncio.Task[None] | None = None
        self.closing = False

    @contextmanager
    def topic(self, job_id: str) -> Iterator[Topic]:
        """The topic of a job while the block runs."""
        topic = self._topics.setdefault(job_id, Topic())
        topic.waiting += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield topic
        finally:
            topic.waiting -= 1
            if not topic.waiting:
                del self._topics[job_id]

    def close(self) -> None:
        """End every wait: the process is to stop."""
        self.closing = True
        for topic in self._topics.values():
            topic.wake()

    async def end(self) -> None:
        """Stop the task, once nobody waits any more."""
        self.close()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        pause = POLL_SECONDS
        try:
            while self._topics:
                began = time.monotonic()
                try:
                    await self._look()
                    pause = max(POLL_SECONDS, SHARE * (time.monotonic() - began))
                except Exception as error:
                    log.warning("watcher.failed", error=str(getattr(error, "orig", error)))
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(pause)
        finally:
            self._task = None

    async def _look(self) -> None:
        watched = dict(self._topics)
        known = {job_id: topic.seq for job_id, topic in watched.items()}
        standings, news = await run_in_threadpool(self._read, known)
        for job_id, topic in watched.items():
            topic.update(standings.get(job_id), news.get(job_id, ()))

    def _read(
        self, known: Mapping[str, int]
    ) -> tuple[dict[str, StandingRecord], dict[str, list[EventRecord]]]:
        with self._database.read() as session:
            standings = jobs.standings(session, known)
            grown = {
                job_id: max(known[job_id], standing.seq - TAIL)
                for job_id, standing in standings.items()
                if standing.seq > known[job_id]
            }
            return standings, events.list_of(session, grown)


def _progress_frame(standing: StandingRecord) -> bytes:
    """Where the job stands; without an id, because it is no event and is not replayed."""
    return format_sse_event(data_str=Standing.of(standing).model_dump_json(), event="progress")
