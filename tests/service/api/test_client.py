"""The Python client against the real application, over connections that break."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from quant.digest import FolderError
from quant.plan import parse_plan
from service.client import Client
from service.remote.handles import PlanNotFound
from service.remote.transport import ClientError, ConnectionFailed, JobFailed, ProblemError
from service.remote.upload import local_file, upload
from service.states import JobState


class Breaking(httpx2.BaseTransport):
    """Passes requests on, or does with one what `breaks` says."""

    def __init__(self, inner: httpx2.BaseTransport) -> None:
        self.inner = inner
        self.breaks: Callable[[httpx2.Request], httpx2.Response | None] = lambda request: None
        self.sent: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request)
        return self.breaks(request) or self.inner.handle_request(request)


@pytest.fixture
def line(api):
    """The connection between client and application."""
    return Breaking(api.http._transport)


@pytest.fixture
def client(line):
    client = Client(http=httpx2.Client(transport=line, base_url="http://testserver"), retries=3)
    client.transport.pause = lambda seconds: None
    with client:
        yield client


@pytest.fixture
def folder(tmp_path, model_files) -> Path:
    path = tmp_path / "llama"
    path.mkdir()
    for name, data in model_files.items():
        (path / name).write_bytes(data)
    (path / "README.md").write_text("stays at home")
    (path / ".gitattributes").write_text("")
    return path


@pytest.fixture
def calibration(tmp_path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("".join(f"line {number}\n" for number in range(20)))
    return path


@pytest.fixture
def submitted(client, folder, calibration):
    return client.submit(folder, calibration, ["4 bpw"], schemes="w2,w4,w8", interactions=False, name="mine")


def once(action):
    """Break until `action` has noted that it is done."""
    done = []
    return lambda request: None if done else action(request, done)


def test_from_a_folder_to_a_plan_file(client, folder, calibration, runner, tmp_path, submitted):
    runner.run(submitted.id)
    seen = []
    path = submitted.wait(on_progress=seen.append).plan("4 bpw").save(tmp_path / "plan.json")
    plan = parse_plan(path.read_bytes())
    assert set(plan.assignment) == {"a.q", "a.k", "b.up", "b.down"}
    assert [resource["state"] for resource in seen] == ["succeeded"]
    assert submitted.resource["name"] == "mine"
    assert submitted.plan("4bpw").evidence["part"] == "reporting"


def test_only_the_files_of_the_model_are_sent_and_only_once(client, folder, line):
    first = client.upload_model(folder)
    assert {file["path"] for file in first["source"]["files"]} == {"config.json", "model.safetensors"}
    line.sent.clear()
    assert client.upload_model(folder)["id"] == first["id"]
    assert not [request for request in line.sent if request.method in {"PUT", "PATCH"}]


def test_progress_of_an_upload_is_reported(client, folder):
    seen = []
    client.upload_model(folder, lambda done, total: seen.append((done, total)))
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    )


def test_a_broken_upload_goes_on_where_it_broke(client, calibration, line):
    def cut(request, done):
        if request.method != "PATCH":
            return
        done.append(True)
        content = request.read()[:50]
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        half = httpx2.Request("PATCH", request.url, content=content, headers=headers)
        assert line.inner.handle_request(half).status_code == 204
        raise httpx2.WriteError("connection reset")

    line.breaks = once(cut)
    seen = []
    done = client.upload_calibration(calibration, lambda done, total: seen.append((done, total)))
    assert done["state"] == "ready"
    offsets = [request.headers["Upload-Offset"] for request in line.sent if request.method == "PATCH"]
    assert offsets == ["0", "50"]
    size = calibration.stat().st_size
    assert (seen[0], (50, size) in seen, seen[-1]) == ((0, size), True, (size, size))


@pytest.mark.parametrize(("status", "slug"), [(409, "upload-busy"), (408, "body-too-slow")])
def test_an_upload_that_the_server_ended_goes_on(client, calibration, line, status, slug):
    def busy(request, done):
        if request.method != "PATCH":
            return None
        done.append(True)
        problem = {"type": f"urn:bitplan:problem:{slug}", "detail": "Go on.", "status": status}
        return httpx2.Response(status, json=problem, headers={"Content-Type": "application/problem+json"})

    line.breaks = once(busy)
    assert client.upload_calibration(calibration)["state"] == "ready"


@pytest.mark.parametrize("size", [2**26, pytest.param(2**30, marks=pytest.mark.slow)])
def test_a_large_file_goes_out_in_constant_memory(tmp_path, size):
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.truncate(size)
    arrived = []

    def answer(request):
        arrived.extend(len(chunk) for chunk in request.stream)
        return httpx2.Response(204, headers={"Upload-Complete": "?1"})

    class Counting(httpx2.BaseTransport):
        def handle_request(self, request):
            if request.method == "PATCH":
                return answer(request)
            blob = {"sha256": sent.sha256, "size": size}
            offset = {"Upload-Offset": "0", "Upload-Complete": "?0"}
            return httpx2.Response(200, json={"id": "upload_1", "missing": [blob]}, headers=offset)

    with Client(http=httpx2.Client(transport=Counting(), base_url="http://testserver")) as client:
        tracemalloc.start()
        sent = local_file(file)
        upload(client.transport, "calibration", [sent])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (sum(arrived), max(arrived)) == (size, 2**20)
    assert peak < 2**23


def test_an_upload_that_never_arrives_says_so(client, calibration, line):
    def cut(request):
        if request.method == "PATCH":
            raise httpx2.WriteError("connection reset")

    line.breaks = cut
    with pytest.raises(
        ConnectionFailed, match=r"calibration.txt must reach the server. Got WriteError.*4 attempts"
    ):
        client.upload_calibration(calibration)


def test_a_lost_answer_does_not_start_a_second_job(client, folder, calibration, line):
    def lose(request, done):
        if request.url.path != "/v1/jobs":
            return
        done.append(True)
        assert line.inner.handle_request(request).status_code == 202
        raise httpx2.ReadError("connection reset")

    line.breaks = once(lose)
    job = client.submit(folder, calibration, ["4 bpw"])
    assert [other.id for other in client.jobs()] == [job.id]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(client, line, status):
    waits = []
    client.transport.pause = waits.append

    def busy(request, done):
        done.append(True)
        return httpx2.Response(status, headers={"Retry-After": "7"})

    line.breaks = once(busy)
    assert client.jobs() == []
    assert waits == [7.0]


def test_an_unreachable_server_is_named(client, line):
    def refuse(request):
        raise httpx2.ConnectError("refused")

    line.breaks = refuse
    with pytest.raises(ConnectionFailed, match=r"http://testserver.* Got ConnectError.*bitplan serve"):
        client.jobs()
    assert len(line.sent) == 4


@pytest.mark.parametrize(
    ("members", "slug"),
    [
        ({"schemes": ["w99"]}, "unknown-scheme"),
        ({"budgets": ["x"]}, "invalid-budget"),
        ({"samples": 1}, "invalid-request"),
        ({"metrics": ["beauty"]}, "unknown-metric"),
    ],
)
def test_problems_are_exceptions_with_the_servers_words(client, folder, calibration, members, slug):
    arguments = {"budgets": ["4 bpw"], **members}
    with pytest.raises(ProblemError) as caught:
        client.submit(folder, calibration, **arguments)
    assert (caught.value.status, caught.value.slug) == (422, slug)
    assert caught.value.pointer in str(caught.value)


def test_a_pickle_is_refused_with_what_to_send(client, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"pytorch_model.bin.*save_pretrained"):
        client.upload_model(folder)


def test_missing_inputs_are_named_before_anything_is_sent(client, folder, tmp_path, line):
    with pytest.raises(FolderError, match=r"Pass a Hugging Face folder"):
        client.submit(tmp_path / "none", "cal_1", ["4 bpw"])
    with pytest.raises(FileNotFoundError, match=r".safetensors, .npz, .txt, .jsonl or .parquet"):
        client.upload_calibration(tmp_path / "none.txt")
    assert line.sent == []


def test_ids_are_used_as_they_are(client, folder, calibration):
    model, data = client.upload_model(folder)["id"], client.upload_calibration(calibration)["id"]
    job = client.submit(model, data, ["4 bpw"])
    assert (job.resource["request"]["model"], job.resource["request"]["calibration"]) == (model, data)
    assert client.model(model)["id"] == client.models()[0]["id"] == model
    assert client.calibrations()[0]["id"] == data


def test_waiting_follows_a_job_to_its_end(client, runner, submitted):
    states = []
    thread = threading.Timer(0.2, runner.run, [submitted.id])
    thread.start()
    submitted.wait(on_progress=lambda resource: states.append(resource["state"]), timeout=30)
    thread.join()
    assert states[0] == "queued"
    assert states[-1] == "succeeded"


def test_a_failed_job_raises_its_problem(client, runner, submitted):
    held = runner.start(submitted.id)
    runner.finish(held, JobState.FAILED, problem={"detail": "Layer a.q must be finite."})
    with pytest.raises(JobFailed, match=r"failed: Layer a\.q must be finite\..*resume") as caught:
        submitted.wait()
    assert caught.value.resource["state"] == "failed"
    resumed = submitted.resume()
    assert resumed.resource["predecessor"] == submitted.id


def test_waiting_ends_at_its_timeout(client, submitted, monkeypatch):
    monkeypatch.setattr("service.remote.handles.WAIT_SECONDS", 0)
    with pytest.raises(TimeoutError, match=r"must end within 0 s"):
        submitted.wait(timeout=0)


def test_other_plans_scores_events_and_frontier(client, runner, submitted, tmp_path):
    runner.run(submitted.id)
    (plan,) = submitted.solve(["6 bpw"], pins={"a.q": "w8"})
    assert plan.document["layers"]["a.q"]["scheme"] == "w8"
    assert client.plan(plan.id).status == plan.refresh().status == "optimal"
    assert plan.evidence is None
    assert plan.explanation(draws=10)["stability"]["draws"] == 10
    assert plan.measure().resource["kind"] == "measure_plan"
    assert len(submitted.scores()) == len(submitted.scores("output_kl")) == 12
    assert submitted.scores()[0].samples == 8
    assert submitted.events()[0]["type"] == "queued"
    assert len(submitted.frontier()) > 4
    assert [other.id for other in submitted.plans()][-1] == plan.id


def test_a_plan_that_does_not_fit_is_not_saved(client, runner, submitted, tmp_path):
    runner.run(submitted.id)
    (plan,) = submitted.solve(["bytes<=1"])
    with pytest.raises(ClientError, match=r"Got infeasible for 'bytes<=1'\. The least budget: bytes \d+"):
        plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanNotFound, match=r"'4 bpw'.*Got '7 bpw'.*solve"):
        submitted.plan("7 bpw")
    assert not (tmp_path / "plan.json").exists()


def test_the_file_has_the_bytes_of_the_service(client, runner, submitted, tmp_path):
    runner.run(submitted.id)
    plan = submitted.plan("4 bpw")
    text = plan.save(tmp_path / "plan.json").read_text()
    assert json.loads(text) == plan.document
    assert parse_plan(text).digest == plan.resource["digest"]


def test_cancel_and_delete(client, submitted):
    assert submitted.cancel().state == "cancelled"
    assert client.job(submitted.id).finished
    submitted.delete()
    with pytest.raises(ProblemError) as caught:
        client.job(submitted.id)
    assert caught.value.slug == "job-not-found"


def test_runtime_and_costs_are_sent(client, folder, calibration):
    job = client.submit(
        folder,
        calibration,
        ["4 bpw"],
        runtime="openvino",
        latency="roofline:h100",
        energy="device:h100",
        deployment={"context_length": 64},
    )
    request = job.resource["request"]
    assert (request["runtime"], request["latency"], request["energy"]) == (
        "openvino",
        "roofline:h100",
        "device:h100",
    )
    assert request["deployment"]["context_length"] == 64
