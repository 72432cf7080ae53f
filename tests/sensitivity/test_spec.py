from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quant.digest import digest
from sensitivity import spec as spec_module
from sensitivity.catalog import SCORERS, offered_metrics
from sensitivity.spec import DataSource, ModelSource, SessionSpec

SPEC = SessionSpec(
    ModelSource("folder", "some/folder", "aa"),
    DataSource("data.txt", "text", "bb"),
    include=("lm_head",),
    exclude=("model.layers.0.*",),
)


def test_json_round_trip() -> None:
    assert SessionSpec.from_json(json.loads(json.dumps(SPEC.as_json()))) == SPEC


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        SessionSpec.from_json(SPEC.as_json() | {"colour": "red"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 1),
        ("samples", True),
        ("samples", 2.5),
        ("sequence_length", 1),
        ("seed", -1),
        ("max_probes", 0),
        ("batch_size", 0),
        ("threads", 0),
        ("relative_error", 0.0),
        ("relative_error", float("nan")),
        ("task", "poetry"),
    ],
)
def test_bad_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .* Got "):
        replace(SPEC, **{field: value})


def test_bad_sources_are_refused() -> None:
    with pytest.raises(ValueError, match=r"folder or factory. Got 'hub'"):
        ModelSource("hub", "x", "aa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"safetensors, npz, text, jsonl. Got 'npy'"):
        DataSource("x", "npy", "aa")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelSource("folder", "elsewhere", "aa")},
        {"calibration": DataSource("copy.txt", "text", "bb")},
        {"include": ()},
        {"exclude": ()},
        {"threads": 2},
    ],
)
def test_places_and_patterns_do_not_change_the_score_set(change: dict[str, object]) -> None:
    assert digest(replace(SPEC, **change).score_settings()) == digest(SPEC.score_settings())


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelSource("folder", "some/folder", "ab")},
        {"calibration": DataSource("data.txt", "text", "bc")},
        {"task": "causal_lm"},
        {"samples": 63},
        {"sequence_length": 511},
        {"seed": 1},
        {"relative_error": 0.2},
        {"max_probes": 64},
        {"batch_size": 4},
        {"device": "cuda"},
    ],
)
def test_whatever_can_change_a_score_changes_the_score_set(change: dict[str, object]) -> None:
    assert digest(replace(SPEC, **change).score_settings()) != digest(SPEC.score_settings())


def test_devices_of_one_kind_share_scores() -> None:
    assert replace(SPEC, device="cuda:1").score_settings() == replace(SPEC, device="cuda:0").score_settings()


def test_a_new_version_of_a_metric_makes_a_new_score_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SPEC.score_settings()["revisions"]
    assert "metric:fisher" not in before
    changed = SCORERS | {"fisher": replace(SCORERS["fisher"], version=2)}
    monkeypatch.setattr(spec_module, "SCORERS", changed)
    assert SPEC.score_settings()["revisions"] == {**before, "metric:fisher": 2}


def test_metrics_that_need_labels_are_not_offered_without_them() -> None:
    assert "hessian_trace" in offered_metrics("image_classification", has_labels=True)
    assert "hessian_trace" not in offered_metrics("image_classification", has_labels=False)
    assert "hessian_trace" not in offered_metrics("generic", has_labels=True)
    assert set(offered_metrics("causal_lm", has_labels=False)) == {*SCORERS} - {"ssim", "user_metric"}
    assert "ssim" in offered_metrics("diffusion", has_labels=False)
