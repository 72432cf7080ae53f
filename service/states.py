"""The states of things, and the one table of legal transitions of a job."""

# ruff: noqa: N818 - an error is named after what went wrong

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Stage(StrEnum):
    """What a running job is doing."""

    FETCHING = "fetching"
    LOADING = "loading"
    GENERATING = "generating"
    SCORING = "scoring"
    SOLVING = "solving"
    MEASURING = "measuring"
    PACKAGING = "packaging"


class JobKind(StrEnum):
    """What a job is for; each has a handler in the runner."""

    SEARCH = "search"
    VERIFY_MODEL = "verify_model"
    MEASURE_PLAN = "measure_plan"
    WRITE_CHECKPOINT = "write_checkpoint"
    MAKE_CALIBRATION = "make_calibration"
    CORRELATE = "correlate"


class UploadState(StrEnum):
    """An upload is open until every blob of its manifest was verified."""

    OPEN = "open"
    COMPLETE = "complete"


class InputState(StrEnum):
    """The states of a model and of a calibration set."""

    VERIFYING = "verifying"
    READY = "ready"
    REJECTED = "rejected"
    DELETED = "deleted"


class WebhookState(StrEnum):
    """The states of a webhook: it waits for the end of its job, then for its delivery."""

    WAITING = "waiting"
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})

PENDING = frozenset({JobState.QUEUED, JobState.RUNNING})
"""States of jobs that may still succeed."""

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLING, JobState.EXPIRED}),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING, JobState.EXPIRED}
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}


class IllegalTransition(ValueError):
    """A job was asked to go where its state does not lead."""

    def __init__(self, job_id: str, old: JobState, new: JobState):
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing: the state is final"
        super().__init__(f"Job {job_id} must go from {old} to one of: {allowed}. Got {new}.")
        self.job_id, self.old, self.new = job_id, old, new


def check_transition(job_id: str, old: JobState, new: JobState) -> None:
    """Raise `IllegalTransition` unless `new` may follow `old`."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(job_id, old, new)
