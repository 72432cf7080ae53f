"""Who is told of a job's end: rows that fall due in the transaction that ends the job, and are claimed until
they are settled.
"""

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service.db.engine import database_clock
from service.db.repositories.rows import record_of
from service.db.tables import JobRow, WebhookRow, now
from service.ids import new_id
from service.records import WebhookRecord
from service.states import WebhookState


def create(session: Session, job_id: str, url: str, secret: str) -> WebhookRecord:
    """A webhook that waits for the end of a job that has not ended."""
    row = WebhookRow(
        id=new_id("msg"), job_id=job_id, url=url, secret=secret, state=WebhookState.WAITING.value
    )
    session.add(row)
    session.flush()
    return _record(row)


def of_job(session: Session, job_id: str) -> WebhookRecord | None:
    """The webhook of a job, or None."""
    row = session.scalars(select(WebhookRow).where(WebhookRow.job_id == job_id)).first()
    return None if row is None else _record(row)


def fall_due(session: Session, job: JobRow) -> None:
    """The job ends in this transaction: its webhook is to be delivered from now on. For repositories only."""
    query = select(WebhookRow).where(
        WebhookRow.job_id == job.id, WebhookRow.state == WebhookState.WAITING.value
    )
    for row in session.scalars(query):
        row.state = WebhookState.PENDING.value
        row.next_attempt_at = _clock(session)
    session.flush()


def is_due(session: Session) -> bool:
    """Whether there is anything to claim."""
    return session.scalars(_due().limit(1)).first() is not None


def claim(session: Session, lease_seconds: float) -> WebhookRecord | None:
    """Begin an attempt: a webhook that is due, the one tried least often first; nobody else gets it until the
    lease is over, and then, if it was not settled, it is due again.
    """
    query = _due().order_by(WebhookRow.attempts, WebhookRow.next_attempt_at, WebhookRow.id).limit(1)
    row = session.scalars(query.with_for_update(skip_locked=True)).first()
    if row is None:
        return None
    row.attempts += 1
    row.next_attempt_at = _clock(session) + lease_seconds
    session.flush()
    return _record(row)


def settle(
    session: Session,
    claimed: WebhookRecord,
    state: WebhookState,
    status: int | None,
    error: str | None = None,
) -> None:
    """The attempt was the last one: delivered, or failed for good. The secret is forgotten."""
    row = _held(session, claimed, any_attempt=state == WebhookState.DELIVERED)
    if row is not None:
        row.state, row.last_status, row.last_error = state.value, status, error
        row.secret = row.next_attempt_at = None
        row.settled_at = now()


def postpone(
    session: Session, claimed: WebhookRecord, seconds: float, status: int | None, error: str | None
) -> None:
    """The attempt has failed: the next one is due after so many seconds."""
    row = _held(session, claimed, any_attempt=False)
    if row is not None:
        row.last_status, row.last_error = status, error
        row.next_attempt_at = _clock(session) + seconds


def _due() -> Select[WebhookRow]:
    return select(WebhookRow).where(
        WebhookRow.state == WebhookState.PENDING.value, WebhookRow.next_attempt_at <= database_clock()
    )


def _held(session: Session, claimed: WebhookRecord, *, any_attempt: bool) -> WebhookRow | None:
    """The row if it is still to be settled and, unless any attempt may, nobody else has tried since."""
    row = session.get(WebhookRow, claimed.id, with_for_update=True, populate_existing=True)
    if row is None or row.state != WebhookState.PENDING.value:
        return None
    return row if any_attempt or row.attempts == claimed.attempts else None


def _clock(session: Session) -> float:
    return session.scalars(select(database_clock())).one()


def _record(row: WebhookRow) -> WebhookRecord:
    return record_of(WebhookRecord, row, state=WebhookState)
