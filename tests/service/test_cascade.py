"""A metric measured near decisions alone gives the program's optimum of the full table, for fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service import picking
from service.db.repositories import scores
from service.errors import Unprocessable
from service.estimate import preview
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.settings import Settings

Tiny = Callable[[str], Any]
MENU = ["w2", "w3", "w4", "w5", "w8"]
PARAMETERS: dict[str, Any] = {
    "budgets": ["3.5 bpw"],
    "schemes": MENU,
    "samples": 8,
    "sequence_length": 12,
    "evaluations": 0,
    "interactions": False,
}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    url = f"sqlite:///{tmp_path}/data/bitplan.db"
    with Local(
        Settings(data_dir=tmp_path / "data", database_url=url, executor="in_process", workers=1)
    ) as local:
        yield local


def search(local: Local, tiny: Any, **changes: Any) -> Any:
    model, data = local.model(folder_source(tiny.folder)), local.calibration(file_data(tiny.data))
    job = local.run(local.request(model, data, {**PARAMETERS, **changes}))
    assert job.state == "succeeded", job.problem
    return job


def test_a_refined_search_has_the_optimum_of_the_full_table(local: Local, tiny: Tiny) -> None:
    refined = search(local, tiny("resnet"), metrics=["fisher"], refine_metric="output_kl")
    with local.database.read() as session:
        measured = len(scores.list_all(session, str(refined.score_set), ["output_kl"]))
    (plan,) = local.plans(refined.id)
    assert refined.summary is not None
    choices = refined.summary["estimate"]["choices"]
    assert plan["metric"] == "output_kl"
    assert plan["score_sources"]["measured"] == measured < choices == plan["score_sources"]["choices"]
    assert set(plan["score_sources"]["layers"].values()) <= {"output_kl", "fisher, calibrated"}
    full = search(local, tiny("resnet"), metrics=["output_kl"])
    (expected,) = local.plans(full.id)
    assert expected["score_sources"] is None
    settings = [one["document"]["digests"]["settings"] for one in (plan, expected)]
    assert settings[0] != settings[1]
    assert plan["objective"] == pytest.approx(expected["objective"], rel=1e-9)
    assert {"additive output_kl", "additive fisher"} <= {entry["source"] for entry in plan["candidates"]}
    assert full.summary is not None
    assert full.summary["forwards"]["scoring"] > 0
    assert full.summary["estimate"]["scores"] == {"wanted": choices, "stored": measured}


def test_auto_picks_what_fits_and_says_why(local: Local, tiny: Tiny) -> None:
    job = search(local, tiny("resnet"), metrics=["auto"])
    assert job.summary["picked"]["request"] == {"metrics": ["output_kl"], "refine_metric": None}
    assert "the most trusted that fits" in job.summary["picked"]["why"]
    assert job.summary["metrics"] == ["output_kl"]
    assert set(job.summary["forwards"]) == {"choosing", "loading", "reporting", "scoring"}

    def picked(**changes: Any) -> Any:
        model, data = folder_source(tiny("resnet").folder), file_data(tiny("resnet").data)
        asked = {**PARAMETERS, "metrics": ["auto"], **changes}
        return preview(local.settings, model, data.source, asked)["picked"]

    poor = picked(time_budget_seconds=1e-6)
    assert "nothing fits, this is the quickest" in poor["why"]
    assert poor["request"]["metrics"] in (["layer_output_error"], ["weight_error"])
    blind = picked(schemes=["w4", "w8-aint8"], budgets=["6 bpw"])
    problems = {entry["name"]: entry["problem"] for entry in blind["considered"]}
    assert problems["gram_fisher"] == "gram_fisher does not see rounded activations"
    assert blind["request"]["metrics"] == ["output_kl"]


def test_auto_says_what_each_way_lacks_where_none_is_possible(
    local: Local, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = folder_source(tiny("resnet").folder), file_data(tiny("resnet").data)
    asked = {**PARAMETERS, "metrics": ["auto"]}
    needed = preview(local.settings, model, data.source, asked)["bytes_per_worker"]
    monkeypatch.setattr(picking, "_memory", lambda: 2 * needed)
    settings = local.settings.model_copy(update={"workers": 3})
    with pytest.raises(Unprocessable, match="Set memory_limit, start fewer workers") as refused:
        preview(settings, model, data.source, asked)
    assert f"output_kl: it needs about {needed:,} bytes of memory in each of 3 workers; " in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ["auto", "fisher"]}, "auto must stand alone"),
        ({"metrics": ["auto"], "refine_metric": "output_kl"}, "auto must stand alone"),
        (
            {"metrics": ["fisher"], "refine_metric": "gram_output"},
            "A refining metric must be one of output_kl",
        ),
        ({"metrics": ["fisher"], "refine_metric": "hessian_trace"}, "A refining metric must be one of"),
        ({"metrics": ["output_kl"], "refine_metric": "output_kl"}, "Got 'output_kl' beside output_kl"),
        ({"metrics": ["sqnr"], "refine_metric": "output_kl"}, "additive first metric"),
        ({"metrics": ["auto"], "time_budget_seconds": 0}, "greater than 0"),
        (
            {"metrics": ["output_mse"], "refine_metric": "output_kl", "contexts": {"plans": "weighted"}},
            "A refining metric must decide over all samples. Got 'output_kl' beside contexts",
        ),
        (
            {"metrics": ["fisher"], "refine_metric": "output_kl", "schemes": ["w8-aint8"]},
            "looks at weights alone",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(local: Local, tiny: Tiny, changes: Any, words: str) -> None:
    model, data = (
        local.model(folder_source(tiny("bert").folder)),
        local.calibration(file_data(tiny("bert").data)),
    )
    with pytest.raises(ValidationError, match=words):
        local.request(model, data, {**PARAMETERS, **changes})
