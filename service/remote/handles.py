"""What the client gives back: a job or a plan that can be asked again."""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quant.catalog import CHECKPOINTS
from search.budget import BudgetError, parse_budget
from service.remote.download import download, unpack
from service.remote.stream import NoStream, messages
from service.remote.transport import ClientError, JobFailed, Transport
from service.states import TERMINAL

WAIT_SECONDS = 20
OnJob = Callable[[Mapping[str, Any]], None]


class PlanNotFound(ClientError):
    """The job has no plan for a budget."""


@dataclass(frozen=True)
class Score:
    """What one (layer, scheme) costs in one metric."""

    layer: str
    scheme: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    difference: float | None = None
    difference_stderr: float | None = None


class PlanHandle:
    """A plan: `resource` is its JSON, `document` the canonical plan (None when nothing fits the budget)."""

    def __init__(self, transport: Transport, resource: Mapping[str, Any]) -> None:
        self._transport, self.resource = transport, resource

    @property
    def id(self) -> str:
        """For example plan_0199..."""
        return str(self.resource["id"])

    @property
    def status(self) -> str:
        """optimal, feasible, infeasible or unknown."""
        return str(self.resource["status"])

    @property
    def document(self) -> dict[str, Any] | None:
        """The plan as stored: layers, totals, digests, certificate."""
        return self.resource["document"]  # type: ignore[no-any-return]

    @property
    def evidence(self) -> dict[str, Any] | None:
        """The measured quality of the plan and its rivals; None until it was measured."""
        return self.resource["evidence"]  # type: ignore[no-any-return]

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """The measured plans that none beats in every objective, for a chooser of several; the `layers` of
        one, as pins of `JobHandle.solve`, make it a plan.
        """
        return list(self.resource["pareto"])

    def save(self, path: str | Path) -> Path:
        """Write the plan file, byte for byte as the service made it; raises ClientError when there is
        none.
        """
        if self.document is None:
            least = self.resource.get("least_budget") or {}
            raise ClientError(
                f"A plan must fit its budget to be saved. Got {self.status} for {self.resource['budget']!r}. "
                f"The least budget: "
                f"{', '.join(f'{name} {value}' for name, value in least.items()) or 'not known'}."
            )
        target = Path(path)
        target.write_bytes(self._transport.send("GET", f"/v1/plans/{self.id}/document").content)
        return target

    def explanation(self, draws: int = 200, seed: int = 0) -> dict[str, Any]:
        """Why the plan is as it is: steps, margins, stability, prices; or why nothing fits."""
        path = f"/v1/plans/{self.id}/explanation"
        return dict(self._transport.get(path, {"draws": draws, "seed": seed}))

    def measure(self) -> JobHandle:
        """Ask for evidence; wait for the job, then `refresh`."""
        return JobHandle(self._transport, self._transport.post(f"/v1/plans/{self.id}/measure"))

    def write_checkpoint(self, consumer: str, *, force: bool = False) -> JobHandle:
        """Have the plan's weights written for a consumer; wait for the job, then `save_checkpoint`."""
        body = {"consumer": consumer, "force": force}
        return JobHandle(self._transport, self._transport.post(f"/v1/plans/{self.id}/checkpoint", body))

    def save_checkpoint(self, consumer: str, path: str | Path) -> Path:
        """Download the written checkpoint to a new or empty folder, or a new file, as the consumer has it.

        It appears whole or not at all; a broken connection is continued. Raises ClientError when `path` is in
        use, ProblemError when nothing was written or it is not ready.
        """
        target, folder = Path(path), CHECKPOINTS[consumer].writes == "folder"
        if target.exists() and not (folder and target.is_dir() and not any(target.iterdir())):
            raise ClientError(
                f"A checkpoint must go to a new or empty place. Got {str(target)!r}. Name another one."
            )
        archive = target.with_name(f".{target.name}.tar") if folder else target
        download(self._transport, f"/v1/plans/{self.id}/checkpoint", {"consumer": consumer}, archive)
        if folder:
            try:
                unpack(archive, target)
            finally:
                archive.unlink()
        return target

    def refresh(self) -> PlanHandle:
        """The same plan as it is now."""
        return PlanHandle(self._transport, self._transport.get(f"/v1/plans/{self.id}"))


class JobHandle:
    """A job on the server; `resource` is its JSON when it was last asked."""

    def __init__(self, transport: Transport, resource: Mapping[str, Any]) -> None:
        self._transport, self.resource = transport, resource
        self._etag: str | None = None

    @property
    def id(self) -> str:
        """For example job_0199..."""
        return str(self.resource["id"])

    @property
    def state(self) -> str:
        """queued, running, cancelling, succeeded, failed, cancelled or expired."""
        return str(self.resource["state"])

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL

    def refresh(self, wait_seconds: int = 0) -> JobHandle:
        """Ask again; with `wait_seconds` the server answers when something changed, or after that time."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        if wait_seconds:
            headers["Prefer"] = f"wait={wait_seconds}"
        response = self._transport.send("GET", self._path(), headers=headers)
        if response.status_code != 304:
            self.resource, self._etag = response.json(), response.headers.get("ETag")
        return self

    def wait(
        self,
        on_progress: OnJob | None = None,
        *,
        timeout: float | None = None,
    ) -> JobHandle:
        """Wait for the end; raises JobFailed unless it succeeded, TimeoutError after `timeout` seconds.

        `on_progress` gets the job's JSON after each change. The job's stream of events tells of changes;
        where the server has none to give, and with a `timeout`, the job is asked for again and again.
        """
        told = on_progress or _ignore
        started, before = time.monotonic(), self._etag
        self.refresh()
        if self._etag != before:
            told(self.resource)
        streams = timeout is None
        while not self.finished:
            if timeout is not None and time.monotonic() - started > timeout:
                raise TimeoutError(
                    f"Job {self.id} must end within {timeout:g} s. Got {self.state}. Wait longer."
                )
            if streams:
                streams = self._follow(told)
            else:
                self._poll(told)
        if self.state != "succeeded":
            raise JobFailed(self.resource)
        return self

    def follow(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Each event as it comes, from behind number `after` to the last one, over connections that break.

        Raises `NoStream` when the server has no stream to give.
        """
        for message in messages(self._transport, f"{self._path()}/events", after):
            if message.seq is not None:
                yield message.data

    def _follow(self, told: OnJob) -> bool:
        """Tell of every change to the end; False when the server has no stream to give."""
        try:
            with closing(messages(self._transport, f"{self._path()}/events")) as stream:
                for message in stream:
                    before = self._etag
                    if message.seq is None:
                        self.resource = {**self.resource, **message.data}
                    else:
                        self.refresh()
                    if message.seq is None or self._etag != before:
                        told(self.resource)
                    if self.finished:
                        return True
        except NoStream:
            return False
        self.refresh()
        return True

    def _poll(self, told: OnJob) -> None:
        """Ask once, and tell of a change."""
        before = self._etag
        self.refresh(wait_seconds=WAIT_SECONDS)
        if self._etag != before:
            told(self.resource)
        else:
            self._transport.pause(0.2)

    def plan(self, budget: str) -> PlanHandle:
        """The plan of one of the job's budgets, in any spelling; raises PlanNotFound with those there are."""
        plans = self.plans()
        for plan in plans:
            if _same_budget(plan.resource["budget"], budget):
                return plan
        there = ", ".join(repr(plan.resource["budget"]) for plan in plans) or "none"
        raise PlanNotFound(
            f"The budget must be one of the job's plans: {there}. Got {budget!r}. "
            "Ask for another with job.solve([budget])."
        )

    def plans(self) -> list[PlanHandle]:
        """All plans, the oldest first."""
        found = self._transport.pages(f"{self._path()}/plans")
        return [PlanHandle(self._transport, resource) for resource in found][::-1]

    def solve(
        self,
        budgets: Sequence[str],
        *,
        limits: Sequence[str] | None = None,
        pins: Mapping[str, str] | None = None,
        ties: Sequence[Sequence[str]] | None = None,
        protect: Sequence[str] | None = None,
        forbid: Mapping[str, Sequence[str]] | None = None,
        role_limits: Mapping[str, str] | None = None,
        metric: str | None = None,
        context: str | None = None,
        time_limit_seconds: float = 10.0,
        gap: float = 1e-9,
        objective: str | None = None,
        runtime: str | None = None,
        latency: str | Mapping[str, Mapping[str, float]] | None = None,
        energy: str | Mapping[str, Mapping[str, float]] | None = None,
        deployment: Mapping[str, Any] | None = None,
        device_profile: Mapping[str, Any] | None = None,
    ) -> list[PlanHandle]:
        """Plan other budgets from the stored scores, in milliseconds; None means "as the job has it"."""
        body: dict[str, Any] = {
            "budgets": list(budgets),
            "limits": None if limits is None else list(limits),
            "pins": None if pins is None else dict(pins),
            "ties": None if ties is None else [list(tie) for tie in ties],
            "protect": None if protect is None else list(protect),
            "forbid": None if forbid is None else {name: list(schemes) for name, schemes in forbid.items()},
            "role_limits": None if role_limits is None else dict(role_limits),
            "metric": metric,
            "context": context,
            "time_limit_seconds": time_limit_seconds,
            "gap": gap,
            "objective": objective,
            "runtime": runtime,
            "latency": latency,
            "energy": energy,
            "deployment": deployment,
            "device_profile": device_profile,
        }
        answer = self._transport.post(f"{self._path()}/plans", body)
        return [PlanHandle(self._transport, resource) for resource in answer["items"]]

    def scores(self, metric: str | None = None, against: str | None = None) -> list[Score]:
        """The stored scores, of one metric or all; `against` a scheme, each with its difference from that
        scheme's score of the same layer, and the standard error over paired samples.
        """
        named = {"metric": metric, "against": against}
        query = {name: value for name, value in named.items() if value}
        return [Score(**row) for row in self._transport.pages(f"{self._path()}/scores", query)]

    def correlate(
        self, plans: int = 60, *, budgets: Sequence[str] | None = None, metrics: Sequence[str] | None = None
    ) -> JobHandle:
        """Start measuring how well metrics rank plans: so many random ones and so many near the optimum at
        each budget. None means the job's budgets, and every metric that is stored for it.
        """
        body = {
            "plans": plans,
            "budgets": None if budgets is None else list(budgets),
            "metrics": None if metrics is None else list(metrics),
        }
        return JobHandle(self._transport, self._transport.post(f"{self._path()}/correlations", body))

    def correlations(self) -> dict[str, Any]:
        """How well each metric ranks measured plans, once `correlate` has been waited for."""
        return dict(self._transport.get(f"{self._path()}/correlations"))

    def frontier(self, resource: str = "bytes") -> list[dict[str, Any]]:
        """The Pareto-optimal plans over a resource, predicted from stored scores."""
        return list(self.trade_off(resource)["items"])

    def trade_off(
        self,
        resource: str = "bytes",
        *,
        metric: str | None = None,
        between: tuple[str, str] | None = None,
        points: int = 100,
    ) -> dict[str, Any]:
        """The same with certificates; with `between` every plan between two totals, and what is left out."""
        asked = {
            "resource": resource,
            "metric": metric,
            "between": None if between is None else ",".join(between),
            "points": points,
        }
        query = {name: value for name, value in asked.items() if value is not None}
        return dict(self._transport.get(f"{self._path()}/frontier", query))

    def events(self) -> list[dict[str, Any]]:
        """What happened to the job, in order."""
        return list(self._transport.pages(f"{self._path()}/events"))

    def cancel(self) -> JobHandle:
        """Stop the job; its scores are kept."""
        self.resource = self._transport.post(f"{self._path()}/cancel")
        self._etag = None
        return self

    def resume(self, webhook: Mapping[str, str] | None = None, deadline: datetime | None = None) -> JobHandle:
        """A new job that goes on from the stored scores of this one, with a webhook (url, secret) and a
        deadline of its own.
        """
        own = {
            "webhook": None if webhook is None else dict(webhook),
            "deadline": None if deadline is None else deadline.isoformat(),
        }
        body = {name: value for name, value in own.items() if value is not None} or None
        return JobHandle(self._transport, self._transport.post(f"{self._path()}/resume", body))

    def webhook(self) -> dict[str, Any]:
        """How far the delivery of the job's webhook has come. Raises ProblemError for a job without one."""
        return dict(self._transport.get(f"{self._path()}/webhook"))

    def delete(self) -> None:
        """Remove a finished job and its plans; scores stay for other jobs."""
        self._transport.send("DELETE", self._path())

    def _path(self) -> str:
        return f"/v1/jobs/{self.id}"


def _ignore(_: Mapping[str, Any]) -> None:
    """What is told to nobody."""


def _same_budget(one: str, other: str) -> bool:
    """Whether two spellings state the same limits."""
    try:
        return set(parse_budget(one).limits) == set(parse_budget(other).limits)
    except BudgetError:
        return one == other
