"""Contexts of samples: named by data or cut by timesteps, scored apart in one pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sensitivity.calibration_check import check_calibration
from sensitivity.contexts import context_of, in_context, members, timestep_ranges, without_context
from sensitivity.errors import BadCalibration, MetricNotOffered
from sensitivity.session import Session
from sensitivity.spec import DataSource
from sensitivity.text import pack
from sensitivity.units import InspectUnit, ScoreUnit

METRICS = ("output_kl", "output_mse", "sqnr", "ssim", "size_normalized")


def with_data(spec: Any, path: Path, kind: str) -> Any:
    return replace(spec, calibration=DataSource(str(path), kind, f"digest of {path}"))


@pytest.fixture(scope="module")
def denoiser(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The denoiser with a class for each of its samples: three of one, the others of another."""
    path = tmp_path_factory.mktemp("contexts") / "steps.safetensors"
    tensors = load_file(tiny("denoiser").data)
    save_file({**tensors, "context": torch.arange(20) % 2}, path)
    return Session(with_data(tiny("denoiser").spec(samples=6), path, "safetensors"))


def test_names_and_ranges() -> None:
    name = in_context("sqnr", "timestep:250-500")
    assert (without_context(name), context_of(name)) == ("sqnr", "timestep:250-500")
    steps = [0, 249, 250.0, 499, 500, 999]
    found = [members(context, None, steps).tolist() for context in timestep_ranges([250, 500])]
    assert np.sum(found, axis=0).tolist() == [1] * 6
    assert [sum(row) for row in found] == [2, 2, 2]
    assert timestep_ranges([0.5]) == ("timestep:-0.5", "timestep:0.5-")


@pytest.mark.parametrize("edges", [(1e-5, 0.1), (1234567, 1234568.5), (1e16, 2e22), (0.1 + 0.2, 0.5)])
def test_ranges_are_cut_at_the_very_edges(edges: tuple[float, float]) -> None:
    steps = [edge for at in edges for edge in (np.nextafter(at, 0), at)]
    found = [members(context, None, steps).tolist() for context in timestep_ranges(edges)]
    assert np.array(found).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("context", "words"),
    [("timestep:-5", "needs an input named timestep"), ("code", "that name one for each sample")],
)
def test_data_must_tell(context: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        members(context, None, None)


@pytest.mark.parametrize(
    "text", ["timestep:", "timestep:a-b", "timestep:5", "timestep:1e-2-3", "timestep:..-5"]
)
def test_a_range_must_be_one(text: str) -> None:
    with pytest.raises(ValueError, match="must be written timestep:250-500"):
        members(text, None, [1.0])


def contexts(session: Session) -> list[str]:
    steps = sorted(session.run(InspectUnit()).facts["timesteps"]["scoring"])
    return ["0", "1", *timestep_ranges([steps[3]])]


def test_a_score_of_a_context_is_that_of_its_samples_alone(denoiser: Session) -> None:
    """Against a session whose scoring part holds nothing else."""
    facts = denoiser.run(InspectUnit()).facts
    for context in contexts(denoiser):
        chosen = members(context, facts["contexts"]["scoring"], facts["timesteps"]["scoring"])
        wanted = tuple(in_context(metric, context) for metric in METRICS)
        rows = denoiser.run(ScoreUnit("conv_in", "w3", (*wanted, "output_kl"))).scores
        alone = Session(denoiser.spec)
        alone.samples.parts["scoring"] = alone.samples.parts["scoring"][chosen]  # type: ignore[index]
        alone.weights = denoiser.weights
        expected = alone.run(ScoreUnit("conv_in", "w3", METRICS)).scores
        assert [row.metric for row in rows] == [*wanted, "output_kl"]
        for row, other in zip(rows, expected, strict=False):
            assert row.value == pytest.approx(other.value, rel=1e-5)
            assert row.stderr == pytest.approx(other.stderr, rel=1e-4)
            assert row.samples == other.samples == chosen.sum()


def test_contexts_share_the_passes_of_all_samples(denoiser: Session) -> None:
    plain = denoiser.run(ScoreUnit("conv_out", "w4", ("output_kl",))).facts["forwards"]
    wanted = tuple(in_context("output_kl", context) for context in contexts(denoiser))
    assert denoiser.run(ScoreUnit("conv_out", "w4", wanted)).facts["forwards"] == plain


def test_weighted_contexts_are_the_whole(denoiser: Session) -> None:
    rows = denoiser.run(ScoreUnit("conv_in", "w2", ("output_kl@0", "output_kl@1", "output_kl"))).scores
    parts = sum(row.samples * row.value for row in rows[:2])
    assert parts / rows[2].samples == pytest.approx(rows[2].value)


@pytest.mark.parametrize(
    ("metric", "error", "words"),
    [
        ("weight_error@0", MetricNotOffered, "Got weight_error"),
        ("gram_output@0", MetricNotOffered, "Got gram_output"),
        ("output_kl@2", BadCalibration, "Got 0 in '2'"),
        ("output_kl@timestep:5000-", BadCalibration, "at least 2 samples"),
        ("output_kl@timestep:x", BadCalibration, "must be written"),
    ],
)
def test_contexts_that_cannot_be_scored(denoiser: Session, metric: str, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        denoiser.run(ScoreUnit("conv_in", "w2", (metric,)))


def test_without_classes_there_are_only_timesteps(tiny: Any) -> None:
    session = Session(tiny("denoiser").spec())
    facts = session.run(InspectUnit()).facts
    assert facts["contexts"] is None
    assert len(facts["timesteps"]["choosing"]) == 6
    with pytest.raises(BadCalibration, match="that name one for each sample"):
        session.run(ScoreUnit("conv_in", "w2", ("output_kl@0",)))


# -- classes of prompts -------------------------------------------------------------------------------


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_sequences_hold_one_class_of_text_each(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    words = {"code": "ba be bi bo bu", "prose": "da de di do du"}
    path.write_text(lines(*({"text": words[name], "context": name} for name in ["code", "prose"] * 30)))
    assert check_calibration(path, "jsonl")["rows"] == 60
    session = Session(with_data(tiny("llama").spec(), path, "jsonl"))
    named = session.samples.contexts
    assert set(named or ()) == {"code", "prose"}
    tokens = {name: set() for name in words}
    for name, row in zip(named or (), session.samples.tensors["input_ids"].tolist(), strict=True):
        tokens[name] |= {*row}
    assert len(tokens["code"] & tokens["prose"]) == 1, "the end of a text alone"
    rows = session.run(ScoreUnit("model.layers.0.mlp.up_proj", "w2", ("output_kl@code", "output_kl"))).scores
    assert 0 < rows[0].samples < rows[1].samples


def test_rows_of_encoders_keep_their_class(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*({"text": f"ba {'be ' * n}", "context": n % 3} for n in range(12))))
    session = Session(with_data(tiny("bert").spec(), path, "jsonl"))
    assert session.samples.contexts == tuple(str(n % 3) for n in range(12))


def test_packing_drops_the_remainder_of_each_class() -> None:
    rows = [([1] * 5, "a"), ([2] * 9, "b"), ([1] * 5, "a"), ([2], "b")]
    sequences, names = pack(rows, 2, 99)
    assert names == ("a",) * 5 + ("b",) * 5
    assert sequences.tolist() == [[1, 1]] * 5 + [[2, 2]] * 5


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"text": "a", "context": "x"}, {"text": "b"}],
            'every row or none must have a "context". Got row 2',
        ),
        (
            [{"text": "a"}, {"text": "b", "context": "x"}],
            'every row or none must have a "context". Got row 2',
        ),
        ([{"text": "a", "context": ""}], '"context" of row 1 must be a name'),
        ([{"text": "a", "context": "a@b"}], '"context" of row 1 must be a name'),
        ([{"text": "a", "context": "timestep:5"}], '"context" of row 1 must be a name'),
        ([{"text": "a", "context": 1.5}], '"context" of row 1 must be a name'),
        ([{"text": "a", "context": True}], '"context" of row 1 must be a name'),
    ],
)
def test_classes_must_be_names(tmp_path: Path, rows: Any, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    with pytest.raises(BadCalibration, match=words):
        check_calibration(path, "jsonl")


def test_classes_of_tensors_are_whole_numbers(tiny: Any, tmp_path: Path) -> None:
    tensors, path = load_file(tiny("denoiser").data), tmp_path / "steps.safetensors"
    for context, words in (
        (torch.zeros(20), "must hold whole numbers"),
        (torch.zeros(20, 2).long(), "one whole number"),
    ):
        save_file({**tensors, "context": context}, path)
        with pytest.raises(BadCalibration, match=words):
            Session(with_data(tiny("denoiser").spec(), path, "safetensors"))
