"""What nobody can know before a worker has looked: the job fails with a clear problem, and the runner goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from service.remote.handles import JobHandle
from service.remote.transport import JobFailed, ProblemError

pytestmark = pytest.mark.slow

FAST = {"schemes": "w2,w4", "samples": 8, "batch_size": 4, "evaluations": 0, "sequence_length": 12}
WEIGHT = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"


@pytest.fixture(scope="module", params=["in_process", pytest.param("local_pool", marks=pytest.mark.slow)])
def variables(request) -> Mapping[str, str]:
    """Worker processes start slowly, so they have their turn with the slow tests."""
    return {"BITPLAN_EXECUTOR": request.param}


@pytest.fixture(scope="module")
def client(service) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def variant(resnet, tmp_path_factory) -> Callable[..., Path]:
    """The resnet's folder with changed tensors (None leaves one out) and changed configuration."""

    def make(tensors: Mapping[str, Any] | None = None, **config: Any) -> Path:
        from safetensors.torch import load_file, save_file

        folder = tmp_path_factory.mktemp("variant")
        shutil.copytree(resnet.folder, folder, dirs_exist_ok=True)
        stored = {**load_file(folder / "model.safetensors"), **(tensors or {})}
        kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Callable[..., Path]:
    def make(**tensors: Any) -> Path:
        from safetensors.torch import save_file

        file = tmp_path_factory.mktemp("data") / "calibration.safetensors"
        save_file(tensors, file)
        return file

    return make


@pytest.fixture(scope="module")
def jobs(client, resnet, llama, variant, data) -> dict[str, JobHandle]:
    """All jobs, queued at once behind each other; each is looked at by a test of its own."""
    import torch

    nan = torch.full((12, 12, 3, 3), float("nan"))
    wide = data(pixel_values=torch.randn(12, 3, 16, 16))
    unlabeled = data(pixel_values=torch.randn(12, 1, 16, 16))
    unknown_token = torch.randint(3, 40, (12, 10)).index_put((torch.tensor([4]),), torch.tensor(4_000))
    tokens = data(input_ids=unknown_token)

    def submit(folder: Any, calibration: Any, **changes: Any) -> JobHandle:
        return client.submit(folder, calibration, ["3 bpw"], **{**FAST, **changes})

    return {
        "pattern": submit(resnet.folder, resnet.calibration, exclude=["resnet.encodr.*"]),
        "pin": submit(resnet.folder, resnet.calibration, pins={"no.such.layer": "w4"}),
        "nan": submit(variant({WEIGHT: nan}), resnet.calibration),
        "missing": submit(variant({WEIGHT: None}), resnet.calibration),
        "extra": submit(variant({"resnet.spare.weight": torch.ones(2, 2)}), resnet.calibration),
        "shape": submit(variant(hidden_sizes=[8, 16]), resnet.calibration),
        "wide": submit(resnet.folder, wide),
        "unlabeled": submit(resnet.folder, unlabeled, metrics=["hessian_trace"]),
        "everything": submit(resnet.folder, resnet.calibration, exclude=["*"]),
        "tokens": submit(llama.folder, tokens),
        "good": submit(resnet.folder, resnet.calibration),
    }


def failed(job: JobHandle) -> dict[str, Any]:
    """The problem of a job that must fail, which must be the sender's to mend."""
    with pytest.raises(JobFailed) as caught:
        job.wait(timeout=120)
    resource = caught.value.resource
    assert resource["state"] == "failed"
    problem: dict[str, Any] = resource["problem"]
    assert 400 <= problem["status"] < 500, problem
    assert " must " in problem["detail"]
    return problem


@pytest.mark.parametrize(
    ("case", "slug", "words"),
    [
        ("nan", "non-finite", ("weights must be finite", WEIGHT, "Export them again")),
        ("missing", "bad-model", ("must be in the folder's weights", WEIGHT)),
        ("extra", "bad-model", ("must be known to the model's configuration", "resnet.spare.weight")),
        (
            "shape",
            "bad-model",
            ("must have the shape that config.json says", "resnet.encoder.stages.1.layers.0."),
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_rejected_and_the_job_says_why(jobs, client, case, slug, words):
    problem = failed(jobs[case])
    model = client.model(jobs[case].resource["request"]["model"])
    assert model["state"] == "rejected"
    assert model["problem"]["type"] == f"urn:bitplan:problem:{slug}"
    assert model["problem"]["status"] == 422
    assert all(word in model["problem"]["detail"] for word in words)
    assert problem["type"] == "urn:bitplan:problem:model-not-usable"
    assert model["problem"]["detail"] in problem["detail"]
    assert problem["cause"]["type"] == model["problem"]["type"]


@pytest.mark.parametrize(
    ("case", "slug", "words"),
    [
        ("pattern", "bad-pattern", ("resnet.encodr.*", "matches no")),
        ("pin", "bad-pattern", ("no.such.layer", "matches no")),
        ("wide", "bad-calibration", ("[12, 3, 16, 16]", "Check the names and shapes")),
        ("unlabeled", "metric-not-offered", ("hessian_trace", "needs", "labels", "Pick another metric")),
        ("everything", "nothing-to-quantize", ("exclude",)),
        ("tokens", "bad-calibration", ("vocabulary", "4000", "row 4", "tokenizer")),
    ],
)
def test_a_job_that_cannot_work_fails_and_says_what_to_do(jobs, case, slug, words):
    problem = failed(jobs[case])
    assert problem["type"] == f"urn:bitplan:problem:{slug}", problem
    for word in words:
        assert word in problem["detail"]


def test_nothing_is_scored_for_a_job_that_cannot_work(jobs):
    for name, job in jobs.items():
        if name != "good":
            failed(job)
            stages = [event["data"]["stage"] for event in job.events() if event["type"] == "stage"]
            assert set(stages) <= {"loading"}
            assert job.plans() == []


def test_the_same_runner_goes_on_and_runs_the_next_job(jobs, service):
    job = jobs["good"].wait(timeout=120)
    assert [plan.status for plan in job.plans()] == ["optimal"]
    assert len(service.logged("runner.started")) == 1
    assert service.alive("runner")
    assert service.logged("job.unexpected_error") == []


def test_a_rejected_model_cannot_be_used_again(jobs, client, resnet):
    failed(jobs["nan"])
    with pytest.raises(ProblemError) as caught:
        client.submit(jobs["nan"].resource["request"]["model"], resnet.calibration, ["3 bpw"])
    assert (caught.value.status, caught.value.slug) == (409, "model-rejected")
    assert "weights must be finite" in caught.value.detail


def test_a_model_that_is_quantized_already_is_refused(client, resnet, variant):
    import torch

    declared = variant(quantization_config={"quant_method": "gptq", "bits": 4})
    stored = variant({WEIGHT: torch.ones(12, 12, 3, 3, dtype=torch.int8)})
    for folder in (declared, stored):
        with pytest.raises(ProblemError) as caught:
            client.submit(folder, resnet.calibration, ["3 bpw"])
        assert caught.value.status == 422
        assert caught.value.slug == "already-quantized"


@pytest.mark.parametrize(
    ("changes", "slug", "word"),
    [
        ({"metrics": ["output_entropy"]}, "unknown-metric", "output_kl"),
        ({"schemes": ["w9"]}, "unknown-scheme", "w9"),
        ({"budgets": ["-3 bpw"]}, "invalid-budget", "-3"),
        ({"exclude": ["resnet.encodr.*"]}, "unknown-layer", "resnet.encodr.*"),
        (
            {"task": "image_classification", "metrics": ["sqnr"], "limits": ["latency<=3 ms"]},
            "missing-latency",
            "Add it, or limit bytes",
        ),
    ],
)
def test_what_is_known_at_once_is_refused_at_once(jobs, client, resnet, changes, slug, word):
    jobs["good"].wait(timeout=120)
    parameters = {"budgets": ["3 bpw"], **FAST, **changes}
    with pytest.raises(ProblemError) as caught:
        client.submit(resnet.folder, resnet.calibration, **parameters)
    assert (caught.value.status, caught.value.slug) == (422, slug)
    assert word in caught.value.detail
