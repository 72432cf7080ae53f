"""The inventory of a job in a column of its own, and indexes for every list.

Revision: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

OLD = {"tenant_created_at_id": ["tenant", "created_at", "id"], "tenant_state": ["tenant", "state"]}
NEW = {
    "tenant_kind_created_at_id": ["tenant", "kind", "created_at", "id"],
    "tenant_state_kind_created_at_id": ["tenant", "state", "kind", "created_at", "id"],
    "tenant_request_digest": ["tenant", "request_digest"],
}

# json_object_agg keeps the order and the text of members, which a cast to jsonb would not.
MOVE_OUT = {
    "sqlite": """
        UPDATE jobs SET inventory = json_extract(summary, '$.inventory'),
                        summary = json_remove(summary, '$.inventory')
        WHERE json_type(summary, '$.inventory') = 'object'
    """,
    "postgresql": """
        UPDATE jobs SET inventory = summary -> 'inventory', summary = coalesce(
            (SELECT json_object_agg(key, value) FROM json_each(summary) WHERE key <> 'inventory'), '{}')
        WHERE json_typeof(summary -> 'inventory') = 'object'
    """,
}
MOVE_BACK = {
    "sqlite": """
        UPDATE jobs SET summary = json_set(summary, '$.inventory', json(inventory))
        WHERE inventory IS NOT NULL AND summary IS NOT NULL
    """,
    "postgresql": """
        UPDATE jobs SET summary = (
            SELECT json_object_agg(key, value)
            FROM (SELECT * FROM json_each(summary) UNION ALL SELECT 'inventory', inventory) AS members)
        WHERE inventory IS NOT NULL AND summary IS NOT NULL
    """,
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("inventory", sa.JSON(), nullable=True))
    op.execute(MOVE_OUT[op.get_bind().dialect.name])
    _replace(OLD, NEW)
    op.create_index(op.f("ix_plans_job_id_created_at_id"), "plans", ["job_id", "created_at", "id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_plans_job_id_created_at_id"), "plans")
    _replace(NEW, OLD)
    op.execute(MOVE_BACK[op.get_bind().dialect.name])
    op.drop_column("jobs", "inventory")


def _replace(old: dict[str, list[str]], new: dict[str, list[str]]) -> None:
    for name in old:
        op.drop_index(op.f(f"ix_jobs_{name}"), "jobs")
    for name, columns in new.items():
        op.create_index(op.f(f"ix_jobs_{name}"), "jobs", columns)
