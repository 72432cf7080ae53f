"""The tables. Rows of these classes never leave `service.db`: repositories turn them into records."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
TERMINAL_EVENT = text("type IN ('succeeded', 'failed', 'cancelled', 'expired')")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite, which knows no zones, keeps it as naive text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database: refuses naive times."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"A time must be aware (UTC). Got {value!r}.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database: always aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Maps Python types to columns.

    Dicts and lists are JSON (SQL NULL for None), floats are 64 bits wide, text is ordered by byte on every
    database.
    """

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - the name and form that SQLAlchemy asks for
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        str: String().with_variant(String(collation="C"), "postgresql"),
        datetime: UtcDateTime(),
        float: Double(),
    }


def now() -> datetime:
    """The time of day, for columns that people read; leases use the database's clock instead."""
    return datetime.now(UTC)


class UploadRow(Base):
    """Manifests that wait for their blobs, or have them."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    purpose: Mapped[str]
    manifest: Mapped[list[Any]]
    state: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)


class BlobRow(Base):
    """Which verified files a tenant has sent."""

    __tablename__ = "blobs"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now)


class ModelRow(Base):
    """Models that were sent, and what verification found."""

    __tablename__ = "models"
    __table_args__ = (Index(None, "tenant", "created_at", "id"), Index(None, "tenant", "digest"))
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    source: Mapped[dict[str, Any]]
    digest: Mapped[str]
    state: Mapped[str]
    problem: Mapped[dict[str, Any] | None]
    summary: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class CalibrationRow(Base):
    """Calibration sets that were sent."""

    __tablename__ = "calibrations"
    __table_args__ = (Index(None, "tenant", "created_at", "id"), Index(None, "tenant", "digest"))
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    source: Mapped[dict[str, Any]]
    digest: Mapped[str]
    kind: Mapped[str]
    state: Mapped[str]
    problem: Mapped[dict[str, Any] | None]
    summary: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class ScoreSetRow(Base):
    """The circumstances under which scores are equal."""

    __tablename__ = "score_sets"
    digest: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    settings: Mapped[dict[str, Any]]
    inspection: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class JobRow(Base):
    """Jobs and who runs them; `lease_expires_at` and `deadline_at` are in seconds of the database's clock.

    `inventory` is long and seldom asked for, so it is read only where it is named.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "state", "created_at", "id"),
        Index(None, "tenant", "kind", "created_at", "id"),
        Index(None, "tenant", "state", "kind", "created_at", "id"),
        Index(None, "tenant", "request_digest"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    kind: Mapped[str]
    state: Mapped[str]
    stage: Mapped[str | None]
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    total: Mapped[int] = mapped_column(BigInteger, default=0)
    eta_seconds: Mapped[float | None]
    request: Mapped[dict[str, Any]]
    request_digest: Mapped[str]
    score_set: Mapped[str | None] = mapped_column(ForeignKey("score_sets.digest"), index=True)
    summary: Mapped[dict[str, Any] | None]
    problem: Mapped[dict[str, Any] | None]
    epoch: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None]
    lease_host: Mapped[str | None]
    lease_pid: Mapped[int | None]
    lease_process: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    predecessor: Mapped[str | None]
    version: Mapped[int] = mapped_column(BigInteger, default=1)
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    inventory: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    deadline_at: Mapped[float | None]


class EventRow(Base):
    """What happened to a job; the partial unique index allows one terminal event."""

    __tablename__ = "events"
    __table_args__ = (
        Index(
            "uq_events_terminal",
            "job_id",
            unique=True,
            sqlite_where=TERMINAL_EVENT,
            postgresql_where=TERMINAL_EVENT,
        ),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=now)


class WebhookRow(Base):
    """Who is told of a job's end: the outbox of deliveries. Times of attempts are of the database's clock."""

    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "state", "next_attempt_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), unique=True)
    url: Mapped[str]
    secret: Mapped[str | None]
    state: Mapped[str]
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    settled_at: Mapped[datetime | None]


class UnitRow(Base):
    """Finished units of work."""

    __tablename__ = "units"
    score_set: Mapped[str] = mapped_column(ForeignKey("score_sets.digest"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    unit: Mapped[dict[str, Any]]
    facts: Mapped[dict[str, Any]]
    artifact: Mapped[str | None] = mapped_column(index=True)
    job_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class ScoreRow(Base):
    """What one (layer, scheme) costs in one metric."""

    __tablename__ = "scores"
    score_set: Mapped[str] = mapped_column(ForeignKey("score_sets.digest"), primary_key=True)
    layer: Mapped[str] = mapped_column(primary_key=True)
    scheme: Mapped[str] = mapped_column(primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    stderr: Mapped[float | None]
    samples: Mapped[int] = mapped_column(BigInteger)
    unit_key: Mapped[str]


class AttemptRow(Base):
    """How often a unit cost a worker its life."""

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    unit_key: Mapped[str] = mapped_column(primary_key=True)
    attempts: Mapped[int]
    last_failure: Mapped[dict[str, Any]]


class FaultRow(Base):
    """Repeated units that gave another result."""

    __tablename__ = "faults"
    id: Mapped[str] = mapped_column(primary_key=True)
    score_set: Mapped[str] = mapped_column(ForeignKey("score_sets.digest"), index=True)
    unit_key: Mapped[str]
    kept: Mapped[dict[str, Any]]
    got: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=now)


class PlanRow(Base):
    """What a job answered to a budget."""

    __tablename__ = "plans"
    __table_args__ = (
        UniqueConstraint("job_id", "budget", "settings_digest"),
        Index(None, "job_id", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    budget: Mapped[str]
    settings_digest: Mapped[str]
    digest: Mapped[str | None]
    status: Mapped[str]
    document: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any]]
    evidence: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class RunnerRow(Base):
    """Runners that serve, or died without saying so; `seen_at` is in seconds of the database's own clock."""

    __tablename__ = "runners"
    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    process: Mapped[str]
    version: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(default=now)
    seen_at: Mapped[float]
    metrics: Mapped[str]


class IdempotencyKeyRow(Base):
    """Requests that may be repeated."""

    __tablename__ = "idempotency_keys"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[str]
    status: Mapped[int | None]
    body: Mapped[dict[str, Any] | None]
    headers: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class TenantRow(Base):
    """Who shares the service, and quotas of their own where they have some (0: no limit)."""

    __tablename__ = "tenants"
    name: Mapped[str] = mapped_column(primary_key=True)
    quota_jobs: Mapped[int | None] = mapped_column(BigInteger)
    quota_bytes: Mapped[int | None] = mapped_column(BigInteger)
    quota_running: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now)


class KeyRow(Base):
    """API keys: of the secret only its SHA-256 digest, and the part of it by which the row is found."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    name: Mapped[str]
    scope: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditRow(Base):
    """Who wrote what: a row before a write begins, its status when it was answered."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    key_id: Mapped[str | None]
    peer: Mapped[str | None]
    action: Mapped[str]
    method: Mapped[str]
    path: Mapped[str]
    request_id: Mapped[str]
    status: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
