"""What a receiver is told: that a job has ended, and where to ask for more."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from service.records import JobRecord


def message_of(job: JobRecord) -> dict[str, Any]:
    """The message of a job that has ended, in the form of Standard Webhooks (type, timestamp, data)."""
    assert job.finished_at is not None
    return {
        "type": f"job.{job.state}",
        "timestamp": job.finished_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "data": {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "name": job.request.get("name"),
            "labels": dict(job.request.get("labels") or {}),
            "problem": None if job.problem is None else dict(job.problem),
            "links": {"self": f"/v1/jobs/{job.id}", "plans": f"/v1/jobs/{job.id}/plans"},
        },
    }
