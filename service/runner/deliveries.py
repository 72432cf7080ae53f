"""Delivering webhooks at least once: rows that are due are claimed, sent, and settled or tried again later.

A process that dies between claim and settlement loses nothing: the row is due again when its lease is over,
and the receiver may get the message twice, with the same id.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import DBAPIError

from service.db.engine import Database
from service.db.repositories import jobs, webhooks
from service.failpoints import failpoint
from service.metrics import WEBHOOK_ATTEMPTS
from service.records import WebhookRecord
from service.settings import Settings
from service.states import WebhookState
from service.webhooks.guard import Guard
from service.webhooks.message import message_of
from service.webhooks.sending import Message, Outcome, Sender

MINUTE, HOUR = 60.0, 3600.0
PAUSES = (5.0, 30.0, 2 * MINUTE, 10 * MINUTE, HOUR / 2, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 12 * HOUR)
"""Seconds after each failed attempt; after the last one, about 28 hours on, the delivery is given up."""
LEASE_SECONDS = 120.0
"""Longer than an attempt takes, the look-up of the name included."""
THREADS = 4
LONGEST_PAUSE_SECONDS = 30.0

log = structlog.get_logger()


class Deliveries:
    """What delivers the webhooks of a database; any number of processes and threads may share the work."""

    def __init__(
        self,
        database: Database,
        sender: Sender,
        *,
        pauses: Sequence[float] = PAUSES,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._database, self._sender = database, sender
        self._pauses, self._lease = pauses, lease_seconds

    def deliver_one(self) -> bool:
        """One attempt at one delivery; False when none is due."""
        with self._database.read() as session:
            if not webhooks.is_due(session):
                return False
        with self._database.write() as session:
            claimed = webhooks.claim(session, self._lease)
        if claimed is None:
            return False
        failpoint("webhook.before_send")
        outcome = self._attempt(claimed)
        failpoint("webhook.after_send")
        self._settle(claimed, outcome)
        return True

    def run(self, stop: threading.Event, poll_seconds: float) -> None:
        """Deliver until `stop`; a database that is away is waited for."""
        pause = poll_seconds
        while not stop.is_set():
            try:
                busy = self.deliver_one()
                pause = poll_seconds
            except DBAPIError as error:
                log.warning("webhook.database_away", error=str(error.orig))
                busy, pause = False, min(2 * pause, LONGEST_PAUSE_SECONDS)
            if not busy:
                stop.wait(pause)

    def _attempt(self, claimed: WebhookRecord) -> Outcome:
        if claimed.attempts > 2 * (len(self._pauses) + 1):
            return Outcome(
                claimed.last_status, "the process that sends it has ended at each attempt", final=True
            )
        with self._database.read() as session:
            job = jobs.get(session, claimed.job_id)
        if job is None:
            return Outcome(None, "the job was deleted", final=True)
        assert claimed.secret is not None, "a pending delivery has its secret"
        return self._sender.send(Message(claimed.id, claimed.url, claimed.secret, message_of(job)))

    def _settle(self, claimed: WebhookRecord, outcome: Outcome) -> None:
        last = outcome.final or claimed.attempts > len(self._pauses)
        with self._database.write() as session:
            if outcome.delivered:
                webhooks.settle(session, claimed, WebhookState.DELIVERED, outcome.status)
            elif last:
                webhooks.settle(session, claimed, WebhookState.FAILED, outcome.status, outcome.error)
            else:
                pause = self._pauses[claimed.attempts - 1]
                webhooks.postpone(session, claimed, pause, outcome.status, outcome.error)
        done = "delivered" if outcome.delivered else "given_up" if last else "failed"
        WEBHOOK_ATTEMPTS.labels(done).inc()
        log.info(
            f"webhook.{done}",
            job=claimed.job_id,
            webhook=claimed.id,
            attempt=claimed.attempts,
            status=outcome.status,
            error=outcome.error,
        )


def deliveries_of(settings: Settings, database: Database) -> Deliveries:
    """The deliveries of a runner, which go where the settings let them."""
    return Deliveries(database, Sender(Guard.of(settings.webhook_networks)))


@contextmanager
def delivering(deliveries: Deliveries, poll_seconds: float, threads: int = THREADS) -> Iterator[None]:
    """Deliver in threads while the block runs; an attempt in progress at its end is finished."""
    stop = threading.Event()
    running = [
        threading.Thread(target=deliveries.run, args=(stop, poll_seconds), name="webhooks", daemon=True)
        for _ in range(threads)
    ]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join()
