"""What answers look like: jobs and what comes out of them."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import ConfigDict, Field

from service.api.resources import Json, Resource, as_json, links_of
from service.records import EventRecord, JobRecord, PlanRecord, ScoreRecord, StandingRecord
from service.states import JobKind


class Progress(Resource):
    """Units of work of the present stage."""

    done: int
    total: int
    eta_seconds: float | None = None


class Job(Resource):
    """A job as it stands."""

    id: str
    kind: str = Field(description=", ".join(JobKind))
    name: str | None = Field(description="As the request has it.")
    labels: dict[str, str]
    state: str = Field(description="queued, running, cancelling, succeeded, failed, cancelled, expired")
    stage: str | None = Field(
        description="fetching, loading, generating, scoring, solving, measuring, packaging"
    )
    progress: Progress
    request: Json
    summary: Json | None
    problem: Json | None = Field(description="Why it failed.")
    score_set: str | None = Field(description="Jobs that name the same score set share its scores.")
    predecessor: str | None = Field(description="The job that this one resumes.")
    cancel_requested: bool
    deadline: datetime | None = Field(description="By then it must have ended, else it is expired.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, record: JobRecord) -> Job:
        """From the record."""
        return cls.model_validate(job_members(record))


def job_members(record: JobRecord) -> Json:
    """The members of a `Job`. Whole pages are written from these: to check each again takes longer than all
    else.
    """
    path = f"/v1/jobs/{record.id}"
    parts = ("events", "scores", "correlations", "plans", "frontier", "cancel", "resume")
    return {
        "id": record.id,
        "kind": record.kind,
        "name": record.request.get("name"),
        "labels": dict(record.request.get("labels") or {}),
        "state": record.state,
        "stage": record.stage,
        "progress": {"done": record.done, "total": record.total, "eta_seconds": record.eta_seconds},
        "request": record.request,
        "summary": record.summary,
        "problem": record.problem,
        "score_set": record.score_set,
        "predecessor": record.predecessor,
        "cancel_requested": record.cancel_requested,
        "deadline": None if record.deadline_at is None else datetime.fromtimestamp(record.deadline_at, UTC),
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "links": links_of(path, *parts) | _download(record),
    }


class Standing(Resource):
    """Where a job stands: what a stream of events sends in between, as `progress`."""

    state: str
    stage: str | None
    progress: Progress

    @classmethod
    def of(cls, record: StandingRecord) -> Standing:
        """From the record."""
        progress = Progress(done=record.done, total=record.total, eta_seconds=record.eta_seconds)
        return cls(state=record.state, stage=record.stage, progress=progress)


def _download(record: JobRecord) -> dict[str, str]:
    """Where the file of a job that writes a checkpoint is, once it is written."""
    if record.kind != JobKind.WRITE_CHECKPOINT:
        return {}
    asked = record.request
    return {"checkpoint": f"/v1/plans/{asked['plan']}/checkpoint?consumer={asked['consumer']}"}


class Event(Resource):
    """One thing that happened to a job; `seq` counts from 1."""

    seq: int
    type: str
    data: Json
    at: datetime

    @classmethod
    def of(cls, record: EventRecord) -> Event:
        """From the record."""
        return cls(seq=record.seq, type=record.type, data=dict(record.data), at=record.at)


class Score(Resource):
    """What one (layer, scheme) costs in one metric."""

    layer: str
    scheme: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    difference: float | None = Field(None, description="Value less that of the scheme `against`.")
    difference_stderr: float | None = Field(
        None, description="Of the difference, over paired samples; null where none were kept."
    )


def score_members(
    record: ScoreRecord, difference: float | None = None, difference_stderr: float | None = None
) -> Json:
    """The members of a `Score`, and how far it is from another scheme's."""
    return {
        "layer": record.layer,
        "scheme": record.scheme,
        "metric": record.metric,
        "value": record.value,
        "stderr": record.stderr,
        "samples": record.samples,
        "difference": difference,
        "difference_stderr": difference_stderr,
    }


class ParetoPoint(Resource):
    """A measured plan that no other one beats in every objective. Its layers as pins make it a plan."""

    source: str = Field(description="Which candidate this is, or the chooser that found it.")
    objectives: dict[str, float] = Field(
        description="The measured loss, or the losses it is made of, and the total of each limited resource."
    )
    measured: Json = Field(description="The loss on the choosing part: mean, stderr.")
    resources: Json = Field(description="Exact totals.")
    layers: dict[str, str] = Field(description="Layer -> scheme.")


class Plan(Resource):
    """The answer to one budget, with its certificate."""

    model_config = ConfigDict(extra="allow")

    id: str
    job: str
    budget: str
    status: str = Field(description="optimal, feasible, infeasible, unknown")
    metric: str | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = Field(
        None, description="(objective - bound) / max(1e-12, |objective|), sign adjusted."
    )
    method: str = Field(
        "", description="What decided: presolve, dual, labels, neighborhoods, ilp, heuristic."
    )
    why: str = Field("", description="Why that method decided.")
    parts: list[Json] = Field(
        [], description="Every number that the objective is about, with its bound and gap where proven."
    )
    source: str | None = Field(None, description="Which candidate this is.")
    candidates: list[Json] = Field([], description="What was measured on the choosing part.")
    pareto: list[ParetoPoint] = Field(
        [],
        description="For a chooser of several objectives: the plans measured on the choosing part that no"
        " other one beats in all objectives, the least loss first.",
    )
    shadow_prices: Json = Field(
        {}, description="Per limit: how much less is lost per unit of the resource by which it is relaxed."
    )
    least_budget: Json = Field({}, description="When infeasible: the least budget per limit.")
    conflict: Json | None = Field(
        None,
        description="When infeasible: limits, pins, ties and rules that no plan keeps all, and what giving "
        "way at each would buy.",
    )
    reference: Json | None = Field(
        None,
        description="The Gaussian rate-distortion reference at the plan's bits: to compare, not a bound.",
    )
    resources: Json = Field({}, description="Exact totals.")
    target: Json | None = Field(
        None,
        description="For a target: what was measured on the choosing and on the reporting part, whether that"
        " confirms it (yes: the whole interval, mean, no), and every size that was tried.",
    )
    score_sources: Json | None = Field(
        None,
        description="Where a refining metric was measured only near decisions: by layer, what stands there.",
    )
    model: Json | None = Field(
        None, description="For a model of a hub: the repository, commit and folder that it came from."
    )
    digest: str | None = Field(None, description="SHA-256 of the plan document.")
    document: Json | None = Field(None, description="The plan; null when nothing fits.")
    evidence: Json | None = Field(None, description="Measured quality; null until measured.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: PlanRecord) -> Plan:
        """From the record."""
        own = {
            "id": record.id,
            "job": record.job_id,
            "budget": record.budget,
            "status": record.status,
            "digest": record.digest,
            "document": as_json(record.document),
            "evidence": as_json(record.evidence),
            "created_at": record.created_at,
            "links": links_of(f"/v1/plans/{record.id}", "document", "explanation", "measure", "checkpoint")
            | {"job": f"/v1/jobs/{record.job_id}"},
        }
        return cls.model_validate({**record.result, **own})


class Plans(Resource):
    """The plans of one re-solve, in the order of the budgets."""

    items: list[Plan]


class FrontierPoint(Resource):
    """One plan that no other beats in both the metric and the resource."""

    objective: float = Field(description="The metric summed over the layers.")
    bound: float = Field(description="No plan that uses as much or less of the resource is better than this.")
    gap: float = Field(description="Between the two, relative.")
    price: float | None = Field(
        description="Supported: what a unit of the resource costs in the metric where this plan is optimal. "
        "Null where the bound was proven at this total."
    )
    resources: Json = Field(description="Exact totals, bits_per_weight among them.")
    layers: dict[str, str] | None = Field(None, description="Layer -> scheme, when asked for.")


class Frontier(Resource):
    """Pareto-optimal plans over one resource, the smallest first, predicted from stored scores."""

    resource: str
    metric: str
    items: list[FrontierPoint]
    complete: bool | None = Field(None, description="With `between`: whether every such plan is there.")
    next_between: list[float | int] | None = Field(
        None, description="With `between`: the totals between which plans are still to come."
    )
