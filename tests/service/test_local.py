"""The service without HTTP: rows that are found again, jobs that go on, and what is estimated beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.digest import file_digest
from sensitivity.scorers import kronecker
from sensitivity.spec import DataSource, ModelSource
from service.db.repositories import events, scores
from service.errors import ServiceError
from service.estimate import preview, stored_scores
from service.local import Local
from service.local_inputs import factory_source, file_data, folder_source
from service.one_off import inspect, measure
from service.runner.inputs import spec_of
from service.runner.loop import Runner
from service.settings import Settings
from service.wire import JobRequest

Tiny = Callable[[str], Any]
PARAMETERS: dict[str, Any] = {
    "budgets": ["5 bpw"],
    "schemes": ["w2", "w4", "w8"],
    "samples": 8,
    "sequence_length": 12,
    "evaluations": 1,
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    url = f"sqlite:///{tmp_path}/data/bitplan.db"
    return Settings(data_dir=tmp_path / "data", database_url=url, executor="in_process", workers=1)


@pytest.fixture
def local(settings: Settings) -> Iterator[Local]:
    with Local(settings) as local:
        yield local


def test_the_same_inputs_are_the_same_rows(local: Local, tiny: Tiny) -> None:
    model, data = folder_source(tiny("llama").folder), file_data(tiny("llama").data)
    assert local.model(model) == local.model(model)
    assert local.calibration(data) == local.calibration(data)
    assert local.calibration(data).digest == file_digest(tiny("llama").data)


def test_factories_are_known_by_their_weights(local: Local, tiny: Tiny, settings: Settings) -> None:
    assert tiny("mlp").location == "tiny_factory:build"
    built, double = (factory_source(f"tiny_factory:{name}", settings) for name in ("build", "build_double"))
    assert built.digest != double.digest
    assert local.model(built).id != local.model(double).id
    assert local.model(built).source == {"kind": "factory", "factory": "tiny_factory:build"}


def test_a_search_tells_how_it_goes_and_leaves_plans(local: Local, tiny: Tiny) -> None:
    model, data = (
        local.model(folder_source(tiny("bert").folder)),
        local.calibration(file_data(tiny("bert").data)),
    )
    request = local.request(model, data, {**PARAMETERS, "memory_limit": "4 TiB"})
    stages = []
    job = local.run(request, lambda resource: stages.append(resource["stage"]))
    assert job.state == "succeeded"
    assert list(dict.fromkeys(stages)) == ["loading", "scoring", "solving", "measuring"]
    [plan] = local.plans(job.id)
    assert plan["budget"] == "5 bpw"
    assert local.job(job.id)["state"] == "succeeded"
    with local.database.read() as session:
        [told] = [
            event.data for event in events.list_after(session, job.id, 0, 100) if event.type == "memory"
        ]
    assert told == local.job(job.id)["summary"]["memory"]
    assert (told["limit"], told["streamed"]) == (2**42, False)


def test_a_fallback_of_a_metric_is_told_in_the_summary(
    local: Local, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a second job, which finds all scores stored."""
    monkeypatch.setattr(kronecker, "LARGEST_SIDE", 20)
    model = local.model(folder_source(tiny("bert").folder))
    data = local.calibration(file_data(tiny("bert").data))
    for budget in ("5 bpw", "6 bpw"):
        asked = {**PARAMETERS, "budgets": [budget], "metrics": ["kronecker"], "evaluations": 0}
        notes = (local.run(local.request(model, data, asked)).summary or {})["notes"]
        assert len(notes) == 4
        assert "kronecker of layer 'encoder.layer.0.intermediate.dense' keeps the diagonal" in notes[0]


def test_an_interrupted_job_is_the_one_that_goes_on(
    local: Local, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = (
        local.model(folder_source(tiny("bert").folder)),
        local.calibration(file_data(tiny("bert").data)),
    )
    request = local.request(model, data, PARAMETERS)

    def interrupt(resource: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.run(request, interrupt)
    first = local.run(request)
    assert first.state == "succeeded"
    assert first.epoch > 1
    assert local.run(request).id != first.id


def test_what_is_stored_is_not_estimated(local: Local, tiny: Tiny, settings: Settings) -> None:
    model, data = folder_source(tiny("bert").folder), file_data(tiny("bert").data)
    before = preview(settings, model, data.source, PARAMETERS)
    assert before["scores"]["stored"] == 0
    local.run(local.request(local.model(model), local.calibration(data), PARAMETERS))
    after = preview(settings, model, data.source, PARAMETERS)
    assert after["scores"]["stored"] == after["scores"]["wanted"] == before["scores"]["wanted"]
    assert (before["forwards"]["scoring"] > 0, after["forwards"]["scoring"]) == (True, 0)
    more = preview(settings, model, data.source, {**PARAMETERS, "schemes": ["w2", "w3", "w4", "w8"]})
    assert 0 < more["forwards"]["scoring"] < before["forwards"]["scoring"]


def test_the_smaller_limit_holds() -> None:
    request = JobRequest.model_validate({"model": "m", "calibration": "c", **PARAMETERS})
    sources = ModelSource("folder", "m", "m"), DataSource("c", "text", "c")
    limited = request.model_copy(update={"memory_limit": "2 GiB"})
    found = [
        spec_of(r, *sources, own).memory_limit for r in (request, limited) for own in ("", "1 GiB", "3 GiB")
    ]
    assert found == [None, 2**30, 3 * 2**30, 2**31, 2**30, 2**31]


def test_nothing_is_stored_where_nothing_is(tiny: Tiny, settings: Settings) -> None:
    request = JobRequest.model_validate({"model": "m", "calibration": "c", **PARAMETERS})
    spec = spec_of(request, folder_source(tiny("bert").folder), file_data(tiny("bert").data).source)
    assert stored_scores(settings, spec) == frozenset()
    assert not settings.data_dir.exists()


def test_measured_plans_lie_between_full_precision_and_two_bits(tiny: Tiny, settings: Settings) -> None:
    request = JobRequest.model_validate({"model": "m", "calibration": "c", **PARAMETERS})
    spec = spec_of(request, folder_source(tiny("bert").folder), file_data(tiny("bert").data).source)
    names = [layer["name"] for layer in inspect(settings, spec)["inventory"]["layers"]]
    plans = [dict.fromkeys(names, scheme) for scheme in ("w8", "w2")]
    full, fine, coarse = (row["divergence"]["mean"] for row in measure(settings, spec, [{}, *plans]))
    assert full == 0 < fine < coarse


@pytest.mark.parametrize("name", ["no_such_module:build", "tiny_factory:not_a_model"])
def test_a_factory_that_is_none_is_refused(tiny: Tiny, settings: Settings, name: str) -> None:
    assert tiny("mlp").model_kind == "factory"
    with pytest.raises(ServiceError, match="factory") as caught:
        factory_source(name, settings)
    assert caught.value.status == 422
    assert not settings.data_dir.exists()


def test_a_choice_without_inputs_is_told_in_the_summary(local: Local, tiny: Tiny) -> None:
    model = local.model(folder_source(tiny("bert").folder))
    data = local.calibration(file_data(tiny("bert").data))
    asked = {**PARAMETERS, "metrics": ["layer_output_error"], "include": ["*word_embeddings"]}
    summary = local.run(
        local.request(model, data, {**asked, "evaluations": 0, "interactions": False})
    ).summary
    [note] = (summary or {})["notes"]
    assert "word_embeddings' takes its inputs as equally likely" in note


def test_what_is_forbidden_is_not_measured(local: Local, tiny: Tiny, settings: Settings) -> None:
    model = local.model(factory_source(tiny("mlp").location, settings))
    data = local.calibration(file_data(tiny("mlp").data))
    forbid = {"0": ["w2", "w8"], "*": ["w2"]}
    asked = {**PARAMETERS, "budgets": ["12 bpw"], "forbid": forbid, "chooser": "black_box"}
    job = local.run(local.request(model, data, asked))
    assert job.state == "succeeded", job.problem
    with local.database.read() as session:
        scored = {(row.layer, row.scheme) for row in scores.list_all(session, str(job.score_set))}
    assert {scheme for layer, scheme in scored if layer == "0"} == {"w4"}
    assert {scheme for _, scheme in scored} == {"w4", "w8"}
    [plan] = local.plans(job.id)
    assert plan["document"]["layers"]["0"]["scheme"] == "w4"
    assert plan["ask"]["forbid"] == forbid
    assert "uniform w4" in {one["source"] for one in plan["candidates"]}
    assert not {"uniform w2", "uniform w8"} & {one["source"] for one in plan["candidates"]}


def test_no_job_is_left_for_other_runners(local: Local, tiny: Tiny, settings: Settings) -> None:
    model, data = (
        local.model(folder_source(tiny("bert").folder)),
        local.calibration(file_data(tiny("bert").data)),
    )
    local.run(local.request(model, data, PARAMETERS))
    assert Runner(settings, local.database, {}).run_one() is None


def test_texts_in_a_parquet_file_are_read_as_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow import parquet

    file = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"text": ["some words"] * 8}), file)
    first, again = file_data(file), file_data(file)
    assert (first.source.kind, first.summary["rows"]) == ("jsonl", 8)
    assert Path(first.source.path).read_text() == '{"text": "some words"}\n' * 8
    assert first.source.digest == again.source.digest
