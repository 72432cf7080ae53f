"""What quantizers that look at outputs are worth on a trained language model, at the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quant.digest import folder_digest
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import MeasureUnit


@pytest.fixture(scope="module")
def session(trained_lm: Any) -> Session:
    model = ModelSource("folder", str(trained_lm.folder), folder_digest(trained_lm.folder)[0])
    data = DataSource(str(trained_lm.calibration), "jsonl", "held out")
    return Session(SessionSpec(model, data, samples=32, sequence_length=128))


def divergence(session: Session, scheme: str) -> float:
    assignment = tuple((layer.name, scheme) for layer in session.inventory.layers)
    return float(np.mean(session.run(MeasureUnit(assignment, "reporting")).arrays["divergence"]))


@pytest.mark.slow  # trains a model for about 20 seconds
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("quantizer", ["gptq", "adaround"])
def test_at_most_three_quarters_of_the_divergence_of_round_to_nearest(
    session: Session, bits: int, quantizer: str
) -> None:
    nearest = divergence(session, f"w{bits}-rtn")
    assert divergence(session, f"w{bits}-{quantizer}") <= 0.75 * nearest
