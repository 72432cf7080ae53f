"""The Python client: the same verbs as the API, without torch.

from service.client import Client

client = Client("http://127.0.0.1:8000")
job = client.submit(model="llama/", calibration="calibration.txt", budgets=["3.5 bpw"])
job.wait().plan("3.5 bpw").save("plan.json")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from service.hub.reference import parse_reference
from service.remote.handles import JobHandle, PlanHandle
from service.remote.key import find_key
from service.remote.transport import ProblemError, Transport
from service.remote.upload import OnBytes, local_file, model_files, upload
from service.states import InputState

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_SECONDS = 1.0
OnState = Callable[[Mapping[str, Any]], None]


class Client:
    """One server. `http` replaces the connection pool (tests, proxies); `retries` counts repeated
    requests, `key` is an API key (else BITPLAN_KEY or the file of BITPLAN_KEY_FILE; none where neither is
    set). Raises ValueError for what has not the form of a key.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        http: httpx2.Client | None = None,
    ) -> None:
        self._http = http or httpx2.Client(base_url=url, timeout=timeout)
        found = find_key(key)
        if found is not None:
            self._http.headers["Authorization"] = f"Bearer {found}"
        self.transport = Transport(self._http, retries=retries)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def upload_model(self, folder: str | Path, on_bytes: OnBytes | None = None) -> dict[str, Any]:
        """Send a Hugging Face folder; files that the server has are not sent again. Returns the model's
        JSON.
        """
        return upload(self.transport, "model", model_files(Path(folder)), on_bytes)

    def hub_model(self, reference: str, on_state: OnState | None = None) -> dict[str, Any]:
        """Have the server fetch a hub's repository, OWNER/NAME@COMMIT or OWNER/NAME@COMMIT:FOLDER, and wait
        until it is ready. Returns the model's JSON; its id is what `submit` takes. `on_state` is told the
        model's JSON each time it is asked for.

        Raises ProblemError where the server does not take it, or the model is rejected; BadReference.
        """
        wanted = parse_reference(reference)
        model = dict(self.transport.post("/v1/models", {"hub": wanted.as_json()}))
        while model["state"] == InputState.VERIFYING:
            if on_state is not None:
                on_state(model)
            self.transport.pause(POLL_SECONDS)
            model = self.model(str(model["id"]))
        if model["state"] != InputState.READY:
            problem = model.get("problem") or {"detail": f"model {model['id']} is {model['state']}"}
            raise ProblemError(int(problem.get("status", 409)), problem)
        return model

    def upload_calibration(self, file: str | Path, on_bytes: OnBytes | None = None) -> dict[str, Any]:
        """Send a calibration file (.safetensors, .npz, .txt, .jsonl, .parquet). Returns the set's JSON."""
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(
                "Calibration must be a .safetensors, .npz, .txt, .jsonl or .parquet file, or an id. "
                f"Got {file}."
            )
        return upload(self.transport, "calibration", (local_file(path),), on_bytes)

    def make_calibration(
        self,
        model: str | Path,
        method: str,
        *,
        samples: int = 192,
        sequence_length: int = 512,
        shape: Sequence[int] = (),
        seed: int = 0,
        on_bytes: OnBytes | None = None,
    ) -> JobHandle:
        """Have the server make calibration data from a model alone; `model` is a folder or an id.

        The ended job's `resource["summary"]["calibration"]` is the id to submit with. `method` is one of
        GET /v1/calibration-methods, `shape` channels, height and width of images.
        """
        model_id = self._input(model, "model_", self.upload_model, on_bytes)
        body = {
            "method": method,
            "samples": samples,
            "sequence_length": sequence_length,
            "shape": list(shape),
            "seed": seed,
        }
        return JobHandle(self.transport, self.transport.post(f"/v1/models/{model_id}/calibrations", body))

    def submit(
        self,
        model: str | Path,
        calibration: str | Path,
        budgets: Sequence[str] = (),
        *,
        targets: Sequence[str] = (),
        schemes: Sequence[str] | str | None = None,
        kv_cache: Sequence[str] | str = (),
        metrics: Sequence[str] = ("output_kl",),
        refine_metric: str | None = None,
        time_budget_seconds: float | None = None,
        interactions: bool = True,
        corrections: Sequence[str] = (),
        role_metrics: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        role_limits: Mapping[str, str] | None = None,
        ratios: Sequence[float] | None = None,
        protect: Sequence[str] = (),
        forbid: Mapping[str, Sequence[str]] | None = None,
        contexts: Mapping[str, Any] | None = None,
        task: str = "auto",
        limits: Sequence[str] = (),
        pins: Mapping[str, str] | None = None,
        ties: Sequence[Sequence[str]] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        samples: int = 64,
        sequence_length: int = 512,
        seed: int = 0,
        device: str = "cpu",
        relative_error: float = 0.1,
        max_probes: int = 128,
        batch_size: int = 8,
        memory_limit: str | None = None,
        evaluations: int = 40,
        chooser: str = "local_search",
        time_limit_seconds: float = 60.0,
        gap: float = 1e-9,
        objective: str = "sum",
        runtime: str | None = None,
        latency: str | Mapping[str, Mapping[str, float]] | None = None,
        energy: str | Mapping[str, Mapping[str, float]] | None = None,
        deployment: Mapping[str, Any] | None = None,
        device_profile: Mapping[str, Any] | None = None,
        latency_ns: Mapping[str, Mapping[str, float]] | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        deadline: datetime | None = None,
        webhook: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> JobHandle:
        """Start a search. `model` is a folder or an id, `calibration` a file or an id; local ones are sent
        first.

        The parameters are those of `POST /v1/jobs`; `webhook` has the members url and secret, `deadline` has
        a time zone. Raises ProblemError with the server's words.
        """
        body: dict[str, Any] = {
            "model": self._input(model, "model_", self.upload_model, on_bytes),
            "calibration": self._input(calibration, "cal_", self.upload_calibration, on_bytes),
            "budgets": list(budgets),
            "targets": list(targets),
            **({} if schemes is None else {"schemes": _listed(schemes)}),
            "kv_cache": _listed(kv_cache),
            "metrics": list(metrics),
            "refine_metric": refine_metric,
            "time_budget_seconds": time_budget_seconds,
            "interactions": interactions,
            "corrections": list(corrections),
            "role_metrics": dict(role_metrics or {}),
            "roles": dict(roles or {}),
            "role_limits": dict(role_limits or {}),
            **({} if ratios is None else {"ratios": list(ratios)}),
            "protect": list(protect),
            "forbid": {name: list(schemes) for name, schemes in (forbid or {}).items()},
            "contexts": None if contexts is None else dict(contexts),
            "task": task,
            "limits": list(limits),
            "pins": dict(pins or {}),
            "ties": [list(tie) for tie in ties],
            "include": list(include),
            "exclude": list(exclude),
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": seed,
            "device": device,
            "relative_error": relative_error,
            "max_probes": max_probes,
            "batch_size": batch_size,
            "memory_limit": memory_limit,
            "evaluations": evaluations,
            "chooser": chooser,
            "time_limit_seconds": time_limit_seconds,
            "gap": gap,
            "objective": objective,
            "runtime": runtime,
            "latency": latency,
            "latency_ns": latency_ns,
            "energy": energy,
            "deployment": deployment,
            "device_profile": device_profile,
            "labels": dict(labels or {}),
            "name": name,
            "deadline": None if deadline is None else deadline.isoformat(),
            "webhook": None if webhook is None else dict(webhook),
        }
        return JobHandle(self.transport, self.transport.post("/v1/jobs", body))

    def is_ready(self) -> bool:
        """Whether a server answers and can serve; one attempt, no waiting."""
        try:
            return bool(self._http.get("/readyz", timeout=2.0).status_code == 200)
        except httpx2.TransportError:
            return False

    def job(self, job_id: str) -> JobHandle:
        """A job by its id."""
        return JobHandle(self.transport, self.transport.get(f"/v1/jobs/{job_id}"))

    def jobs(self) -> list[JobHandle]:
        """All jobs, the newest first."""
        return [JobHandle(self.transport, resource) for resource in self.transport.pages("/v1/jobs")]

    def plan(self, plan_id: str) -> PlanHandle:
        """A plan by its id."""
        return PlanHandle(self.transport, self.transport.get(f"/v1/plans/{plan_id}"))

    def model(self, model_id: str) -> dict[str, Any]:
        """A model's JSON."""
        return dict(self.transport.get(f"/v1/models/{model_id}"))

    def models(self) -> list[dict[str, Any]]:
        """All models, the newest first."""
        return list(self.transport.pages("/v1/models"))

    def calibrations(self) -> list[dict[str, Any]]:
        """All calibration sets, the newest first."""
        return list(self.transport.pages("/v1/calibrations"))

    @staticmethod
    def _input(
        given: str | Path,
        prefix: str,
        send: Callable[[str | Path, OnBytes | None], dict[str, Any]],
        on_bytes: OnBytes | None,
    ) -> str:
        if isinstance(given, str) and given.startswith(prefix) and not Path(given).exists():
            return given
        return str(send(given, on_bytes)["id"])


def _listed(schemes: Sequence[str] | str) -> list[str]:
    return schemes.split(",") if isinstance(schemes, str) else list(schemes)
