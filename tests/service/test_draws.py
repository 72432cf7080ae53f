"""Draws behind scores: found again as they were measured, and paired differences with honest errors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from sensitivity.evidence import paired_difference
from sensitivity.units import ScoreRow, draws_name
from service.draws import COMBINED, Draws, combined
from service.records import ScoreRecord, UnitRecord

SCHEMES = ("w2", "w4")


def record(layer: str, scheme: str, value: float, unit: str, metric: str = "fisher") -> ScoreRecord:
    return ScoreRecord("set", layer, scheme, metric, value, None, 8, unit)


def reader(units: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> Draws:
    """Units by key: kind, document, arrays; an artifact has its unit's key."""

    def unit(key: str) -> UnitRecord | None:
        if key not in units:
            return None
        kind, document, _ = units[key]
        return UnitRecord("set", key, kind, document, {}, key, None, datetime.now(UTC))

    return Draws(unit, lambda key, name: units[key][2].get(name))


@pytest.fixture
def drawn() -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {(layer, scheme): random.random(n) for layer, n in (("a", 8), ("b", 5)) for scheme in SCHEMES}


def test_rows_of_blocks_are_found_again_by_layer_and_scheme(drawn: Any) -> None:
    rows = [ScoreRow(*cell, "fisher", 0.0, 0.0, 8, values) for cell, values in drawn.items()]
    made = combined("fisher", rows)
    draws = reader({made.key: (COMBINED, made.as_json(), made.arrays)})
    for (layer, scheme), values in drawn.items():
        found = draws.of(record(layer, scheme, 0.0, made.key))
        assert found is not None
        assert (found == values).all()
    assert combined("fisher", rows[:2]).key != made.key
    assert combined("taylor", rows).key != made.key


def test_rows_without_draws_leave_none() -> None:
    made = combined("kronecker", [ScoreRow("a", scheme, "kronecker", 1.0, None, 0) for scheme in SCHEMES])
    assert made.arrays == {}
    draws = reader({made.key: (COMBINED, made.as_json(), {})})
    assert draws.of(record("a", "w2", 1.0, made.key)) is None
    assert draws.of(record("a", "w2", 1.0, "combined:kronecker")) is None


def test_differences_are_paired(drawn: Any) -> None:
    units = {
        f"score:a:{scheme}": ("score", {}, {draws_name("output_kl"): drawn["a", scheme]})
        for scheme in SCHEMES
    }
    rows = [
        record("a", scheme, float(drawn["a", scheme].mean()), f"score:a:{scheme}", "output_kl")
        for scheme in SCHEMES
    ]
    difference, stderr = reader(units).difference(*rows)
    expected = paired_difference(drawn["a", "w2"], drawn["a", "w4"])
    assert (difference, stderr) == (pytest.approx(expected.mean), expected.stderr)
    lonely = reader(dict(list(units.items())[:1]))
    assert lonely.difference(*rows) == (pytest.approx(expected.mean), None)


def test_draws_of_other_lengths_are_not_paired(drawn: Any) -> None:
    units = {cell[0]: ("score", {}, {draws_name("fisher"): drawn[cell]}) for cell in drawn}
    assert reader(units).difference(record("a", "w2", 2.0, "a"), record("b", "w2", 1.5, "b")) == (0.5, None)
