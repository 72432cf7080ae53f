"""Searches for the fewest bytes that keep a quality, on tiny models with real measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from quant.plan import plan_from_json
from sensitivity.session import Session
from sensitivity.units import MeasureUnit
from service.cli.main import app
from service.cli.output import target_line
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings
from service.wire import JobRequest

Tiny = Callable[[str], Any]
PARAMETERS: dict[str, Any] = {
    "schemes": ["w2", "w3", "w4", "w8"],
    "samples": 8,
    "sequence_length": 12,
    "batch_size": 8,
    "evaluations": 4,
    "interactions": False,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("targets")
    url = f"sqlite:///{folder}/data/bitplan.db"
    return Settings(data_dir=folder / "data", database_url=url, executor="in_process", workers=1)


@pytest.fixture(scope="module")
def search(settings: Settings, tiny: Tiny) -> Callable[..., Any]:
    """search(**changes) -> (the job's record, its plans, a session like its workers), on a tiny BERT."""
    model = tiny("bert")

    def run(**changes: Any) -> Any:
        with Local(settings) as local:
            source, data = folder_source(model.folder), file_data(model.data)
            wanted = local.request(local.model(source), local.calibration(data), PARAMETERS | changes)
            job = local.run(wanted)
            return job, local.plans(job.id), Session(spec_of(wanted, source, data.source))

    return run


@pytest.fixture(scope="module")
def ends(search: Any) -> tuple[float, float]:
    """What the smallest and the largest uniform plan measure on the choosing part."""
    _, _, session = search(targets=["divergence<=0.5"])
    names = [layer.name for layer in session.inventory.layers]
    return tuple(
        float(
            session.run(MeasureUnit(tuple((n, scheme) for n in names), "choosing"))
            .arrays["divergence"]
            .mean()
        )
        for scheme in ("w2", "w8")
    )  # type: ignore[return-value]


def test_the_smallest_plan_that_keeps_the_quality_is_found_and_confirmed(
    search: Any, ends: tuple[float, float]
) -> None:
    wanted = float(np.sqrt(ends[0] * ends[1]))
    text = f"divergence<={wanted:.6g}"
    job, [answer], session = search(targets=[text], budgets=[])
    assert job.state == "succeeded", job.problem
    assert (answer["budget"], answer["status"]) == (text, "optimal")
    target, plan = answer["target"], plan_from_json(answer["document"])
    for part in ("choosing", "reporting"):
        values = session.run(MeasureUnit(tuple(plan.assignment.items()), part)).arrays["divergence"]
        assert target[part]["mean"] == pytest.approx(values.mean(), rel=1e-9)
        assert target[part]["samples"] == len(values)
    assert target["choosing"]["mean"] <= wanted
    agrees = target["reporting"]["mean"] <= wanted
    assert (target["confirmed"] != "no") == agrees
    assert answer["evidence"]["entries"][0]["divergence"]["mean"] == target["reporting"]["mean"]
    assert plan.source == answer["source"]
    met = [step["bytes"] for step in target["steps"] if step["met"]]
    failed = [step["bytes"] for step in target["steps"] if not step["met"] and step["bytes"] < min(met)]
    assert plan.totals.bytes <= min(met)
    assert failed
    assert len({step["bytes"] for step in target["steps"]}) <= 9
    assert target_line(target).startswith(f"target {text}: 0.")


def test_it_goes_on_from_what_is_stored(search: Any, ends: tuple[float, float]) -> None:
    text = f"divergence<={float(np.sqrt(ends[0] * ends[1])):.6g}"
    _, [first], _ = search(targets=[text], budgets=[])
    job, [again], _ = search(targets=[text], budgets=[], name="again")
    assert job.summary["forwards"] == {}
    assert again["target"] == first["target"]
    assert again["digest"] == first["digest"]


def test_what_no_plan_keeps_is_told(search: Any, ends: tuple[float, float]) -> None:
    text = f"divergence<={ends[1] / 100:.6g}"
    job, [answer], _ = search(targets=[text], budgets=["4 bpw"][:0])
    assert job.state == "succeeded"
    assert (answer["status"], answer["document"]) == ("infeasible", None)
    assert f"no plan of the menu meets '{text}': the largest one, of" in answer["reason"]
    assert "add schemes of more bits" in answer["reason"]
    assert answer["target"]["reporting"] is None
    assert [step["met"] for step in answer["target"]["steps"]] == [False]
    assert "not met; 1 sizes tried" in target_line(answer["target"])


def test_limits_hold_beside_the_target(search: Any, ends: tuple[float, float]) -> None:
    wanted = float(np.sqrt(ends[0] * ends[1]))
    _, plans, _ = search(
        targets=[f"divergence<={ends[0] * 2:.6g}", f"divergence<={wanted:.6g}"], limits=["3.2 bpw"]
    )
    loose, tight = plans
    assert loose["status"] == "optimal"
    assert loose["resources"]["bits_per_weight"] == pytest.approx(3.0, abs=0.2)
    assert tight["status"] == "infeasible"


def test_a_quality_that_the_task_lacks_is_refused(search: Any) -> None:
    job, plans, _ = search(targets=["accuracy within 0.5 points"])
    assert (job.state, plans) == ("failed", [])
    assert job.problem["type"].endswith("target-not-offered")
    assert "Got 'accuracy within 0.5 points'" in job.problem["detail"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"targets": ["kl>=1"]}, "A target on kl must be <= a number"),
        ({"targets": ["kl<=1", "kl<=1"]}, "must be distinct"),
        ({}, "must have a budget or a target"),
        (
            {"targets": ["kl<=1"], "metrics": ["gram_fisher"], "refine_metric": "output_kl"},
            "without a refining",
        ),
        ({"targets": ["kl<=1"], "contexts": {}}, "over all samples for the plain objective"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(members: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JobRequest.model_validate({"model": "m", "calibration": "c", **members})


@pytest.mark.slow
def test_the_command_takes_targets(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("resnet")
    plan = tmp_path / "plan.json"
    options = ["-c", str(model.data), "--target", "accuracy within 60 points", "-o", str(plan)]
    few = ["--schemes", "w2,w8", "--samples", "8", "--evaluations", "2", "--no-interactions"]
    found = CliRunner().invoke(
        app, ["run", str(model.folder), *options, *few, "--data-dir", str(tmp_path / "d")]
    )
    assert found.exit_code == 0, found.output
    assert "target accuracy within 60 points: " in found.output
    assert "points on the reporting part" in found.output
    assert plan.is_file()
