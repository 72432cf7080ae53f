from __future__ import annotations

import json

import pytest

from sensitivity.units import (
    KEY_LIMIT,
    BlockUnit,
    InspectUnit,
    MeasureUnit,
    ScoreUnit,
    Unit,
    WriteUnit,
    unit_from_json,
)

UNITS: tuple[Unit, ...] = (
    ScoreUnit("model.layers.0.mlp.down_proj", "w4", ("output_kl", "gram_output")),
    ScoreUnit("layer" * 100, "w4", ("output_kl",)),
    BlockUnit("fisher", "samples:0:8", ("w2", "w4"), ("a", "b")),
    BlockUnit("hessian_trace", f"layer:{'deep.' * 100}:probes:0:16", (), ("deep." * 100,)),
    MeasureUnit((("b", "w4"), ("a", "w2")), "choosing"),
    MeasureUnit((), "reporting"),
    InspectUnit(),
    WriteUnit("vllm", "/tmp/folder", True),
)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: type(unit).__name__)
def test_json_round_trip_keeps_unit_and_key(unit: Unit) -> None:
    again = unit_from_json(json.loads(json.dumps(unit.as_json())))
    assert again == unit
    assert again.key == unit.key


def test_keys_are_short_and_unique() -> None:
    keys = [unit.key for unit in UNITS]
    assert len(set(keys)) == len(UNITS)
    assert max(map(len, keys)) <= KEY_LIMIT


def test_keys_never_change() -> None:
    """They are stored: a new spelling would measure everything again."""
    assert ScoreUnit("fc", "w4", ("sqnr", "output_kl")).key == "score:fc:w4:sqnr+output_kl"
    assert BlockUnit("fisher", "samples:0:8", ("w4",), ("fc",)).key == (
        "block:fisher:samples:0:8:7b0bc3c65a213f1481c7ccba51570575"
    )
    assert MeasureUnit((), "choosing").key == (
        "measure:choosing:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    )


def test_the_order_of_an_assignment_does_not_matter() -> None:
    assert MeasureUnit((("b", "w4"), ("a", "w2")), "choosing") == MeasureUnit(
        (("a", "w2"), ("b", "w4")), "choosing"
    )


def test_layers_and_schemes_are_part_of_a_blocks_key() -> None:
    keys = {
        BlockUnit("fisher", "samples:0:8", schemes, layers).key
        for schemes, layers in ((("w2",), ("a", "b")), (("w2", "w4"), ("a", "b")), (("w2",), ("a",)))
    }
    assert len(keys) == 3


def test_bad_units_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unit must be one of score, block, measure, .* make. Got 'dance'"):
        unit_from_json({"unit": "dance"})
    with pytest.raises(ValueError, match=r"part must be choosing, reporting or all. Got 'scoring'"):
        MeasureUnit((), "scoring")  # type: ignore[arg-type]
