"""Initial schema.

Revision: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Ordered by byte on every database, as Python orders.
TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")
TERMINAL_EVENT = sa.text("type IN ('succeeded', 'failed', 'cancelled', 'expired')")


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("sha256", TEXT, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "sha256", name=op.f("pk_blobs")),
    )
    op.create_table(
        "calibrations",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("summary", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_calibrations")),
    )
    op.create_index(
        op.f("ix_calibrations_tenant_created_at_id"),
        "calibrations",
        ["tenant", "created_at", "id"],
        unique=False,
    )
    op.create_index(op.f("ix_calibrations_tenant_digest"), "calibrations", ["tenant", "digest"])

    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("request_digest", TEXT, nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=True),
        sa.Column("headers", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "models",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("summary", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
    )
    op.create_index(op.f("ix_models_tenant_created_at_id"), "models", ["tenant", "created_at", "id"])
    op.create_index(op.f("ix_models_tenant_digest"), "models", ["tenant", "digest"])

    op.create_table(
        "score_sets",
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("inspection", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_score_sets")),
    )
    op.create_table(
        "uploads",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_table(
        "faults",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("score_set", TEXT, nullable=False),
        sa.Column("unit_key", TEXT, nullable=False),
        sa.Column("kept", sa.JSON(), nullable=False),
        sa.Column("got", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["score_set"], ["score_sets.digest"], name=op.f("fk_faults_score_set_score_sets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_faults")),
    )
    op.create_index(op.f("ix_faults_score_set"), "faults", ["score_set"])

    op.create_table(
        "jobs",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("stage", TEXT, nullable=True),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("eta_seconds", sa.Double(), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("request_digest", TEXT, nullable=False),
        sa.Column("score_set", TEXT, nullable=True),
        sa.Column("summary", sa.JSON(), nullable=True),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("lease_owner", TEXT, nullable=True),
        sa.Column("lease_host", TEXT, nullable=True),
        sa.Column("lease_pid", sa.Integer(), nullable=True),
        sa.Column("lease_process", TEXT, nullable=True),
        sa.Column("lease_expires_at", sa.Double(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("predecessor", TEXT, nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["score_set"], ["score_sets.digest"], name=op.f("fk_jobs_score_set_score_sets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_score_set"), "jobs", ["score_set"])
    op.create_index(op.f("ix_jobs_state_created_at_id"), "jobs", ["state", "created_at", "id"])
    op.create_index(op.f("ix_jobs_tenant_created_at_id"), "jobs", ["tenant", "created_at", "id"])

    op.create_table(
        "scores",
        sa.Column("score_set", TEXT, nullable=False),
        sa.Column("layer", TEXT, nullable=False),
        sa.Column("scheme", TEXT, nullable=False),
        sa.Column("metric", TEXT, nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("stderr", sa.Double(), nullable=True),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("unit_key", TEXT, nullable=False),
        sa.ForeignKeyConstraint(
            ["score_set"], ["score_sets.digest"], name=op.f("fk_scores_score_set_score_sets")
        ),
        sa.PrimaryKeyConstraint("score_set", "layer", "scheme", "metric", name=op.f("pk_scores")),
    )
    op.create_table(
        "units",
        sa.Column("score_set", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("unit", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("artifact", TEXT, nullable=True),
        sa.Column("job_id", TEXT, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["score_set"], ["score_sets.digest"], name=op.f("fk_units_score_set_score_sets")
        ),
        sa.PrimaryKeyConstraint("score_set", "key", name=op.f("pk_units")),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("unit_key", TEXT, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("last_failure", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "unit_key", name=op.f("pk_attempts")),
    )
    op.create_table(
        "events",
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_events")),
    )
    op.create_index(
        "uq_events_terminal",
        "events",
        ["job_id"],
        unique=True,
        sqlite_where=TERMINAL_EVENT,
        postgresql_where=TERMINAL_EVENT,
    )

    op.create_table(
        "plans",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("budget", TEXT, nullable=False),
        sa.Column("settings_digest", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=True),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("document", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("evidence", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_plans_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
        sa.UniqueConstraint(
            "job_id", "budget", "settings_digest", name=op.f("uq_plans_job_id_budget_settings_digest")
        ),
    )


def downgrade() -> None:
    op.drop_table("plans")
    op.drop_table("events")
    op.drop_table("attempts")
    op.drop_table("units")
    op.drop_table("scores")
    op.drop_table("jobs")
    op.drop_table("faults")
    op.drop_table("uploads")
    op.drop_table("score_sets")
    op.drop_table("models")
    op.drop_table("idempotency_keys")
    op.drop_table("calibrations")
    op.drop_table("blobs")
