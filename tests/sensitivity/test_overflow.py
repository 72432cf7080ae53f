"""Half precision that overflows is measured in float32, and the result says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockUnit, MeasureUnit, ScoreUnit

FACTORY = '''
import torch
from torch import nn

def build(dtype=torch.float16):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    model[0].weight.data = torch.eye(8)
    row = torch.tensor([90.0, 90.0, 90.0, -270.0]).repeat(2)
    model[1].weight.data = torch.tensor([1.0, 0.9, 0.8, 0.7])[:, None] * row
    return model.to(dtype)

def build_full():
    return build(torch.float16).float()

class Looked(nn.Module):
    """A table whose outputs leave float16 once it is changed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.register_buffer("kept", self.table.weight.detach().clone())

    def forward(self, x):
        changed = (self.table.weight != self.kept).any()
        return self.table(x).mean(1) * (1e6 if changed else 1.0)

def build_table():
    torch.manual_seed(0)
    return Looked().half()
'''
"""The last layer's rows sum to nothing, and its inputs are large and alike: what cancels in the stored weights
overflows float16 in two bits.
"""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, ...]]:
    """The model in float16, the same weights in float32, and the table."""
    folder = tmp_path_factory.mktemp("overflowing")
    (folder / "overflowing_factory.py").write_text(FACTORY, encoding="utf-8")
    data = folder / "x.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({"x": 2000 + 10 * torch.randn(24, 8, generator=generator)}, data)
    tokens = folder / "tokens.safetensors"
    save_file({"x": torch.arange(96).reshape(24, 4) % 8}, tokens)
    sys.path.insert(0, str(folder))
    try:
        yield tuple(
            Session(
                SessionSpec(
                    ModelSource("factory", f"overflowing_factory:{name}", name),
                    DataSource(str(file), "safetensors", "x"),
                    samples=8,
                    include=include,
                )
            )
            for name, file, include in (
                ("build", data, ()),
                ("build_full", data, ()),
                ("build_table", tokens, ("*",)),
            )
        )
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(
    "unit", [ScoreUnit("1", "w2-rtn", ("output_kl", "sqnr")), MeasureUnit((("1", "w2-rtn"),), "choosing")]
)
def test_what_overflows_in_half_precision_is_measured_in_float32(unit: Any, sessions: Any) -> None:
    half, full, _ = sessions
    found, expected = half.run(unit), full.run(unit)
    assert found.scores == expected.scores
    for name, values in expected.arrays.items():
        assert (np.asarray(found.arrays[name]) == np.asarray(values)).all()
    [note] = found.facts["notes"]
    assert "overflows in float16: measured in float32." in note["text"]
    assert "notes" not in expected.facts


def test_notes_of_the_measurement_in_float32_are_told_once(sessions: Any) -> None:
    """layer_output_error notes what it takes for inputs, before output_kl overflows and in float32 again."""
    *_, table = sessions
    unit = ScoreUnit("table", "w2-rtn", ("layer_output_error", "output_kl"))
    for _ in range(2):
        assert [note["text"] for note in table.run(unit).facts["notes"]] == [
            "layer_output_error of layer 'table' takes its inputs as equally likely.",
            "output_kl of layer 'table' overflows in float16: measured in float32.",
        ]
    alone = ScoreUnit("table", "w2-rtn", ("output_kl", "layer_output_error"))
    assert len(table.run(alone).facts["notes"]) == 2


def test_what_does_not_overflow_stays_in_the_models_precision(sessions: Any) -> None:
    half, full, _ = sessions
    unit = ScoreUnit("1", "w8-rtn", ("output_kl",))
    found, expected = half.run(unit), full.run(unit)
    assert "notes" not in found.facts
    assert found.scores[0].value != expected.scores[0].value
    assert found.scores[0].value == pytest.approx(expected.scores[0].value, rel=0.5)


def test_gradients_that_overflow_are_taken_in_float32(sessions: Any) -> None:
    half, full, _ = sessions
    unit = BlockUnit("fisher", "samples:0:8", ("w2-rtn",), ("0", "1"))
    expected = full.run(unit).arrays["values"]
    found = half.run(unit)
    assert np.isfinite(found.arrays["values"]).all()
    assert found.arrays["values"] == pytest.approx(expected, rel=0.2)


def test_layers_without_outputs_of_their_own_say_what_stands_for_them(tiny: Any) -> None:
    session = Session(tiny("mixtral").spec())
    expert = next(layer.name for layer in session.inventory.layers if "expert" in layer.op)
    block = session.run(BlockUnit("gradient_output", "samples:0:2", ("w4",), (expert,)))
    assert block.facts["notes"] == [
        {
            "layer": expert,
            "text": f"gradient_output of layer '{expert}' takes rows of the gradient for outputs.",
        }
    ]


def test_an_embedding_says_that_it_has_no_inputs_to_go_by(tiny: Any) -> None:
    session = Session(tiny("llama").spec(include=("*embed_tokens",)))
    result = session.run(ScoreUnit("model.embed_tokens", "w4", ("layer_output_error",)))
    assert [note["layer"] for note in result.facts["notes"]] == ["model.embed_tokens"]
