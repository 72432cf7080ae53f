"""What quantizers that look at outputs are worth on a trained language model, at the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quant.digest import folder_digest
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import MeasureUnit

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The demo's language model after a third of its training."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_demo_models
    finally:
        sys.path.remove(str(EXAMPLES))
    threads, steps = torch.get_num_threads(), train_demo_models.LM_STEPS
    train_demo_models.LM_STEPS = steps // 3
    try:
        trained = train_demo_models.train_lm(tmp_path_factory.mktemp("models"))
    finally:
        train_demo_models.LM_STEPS = steps
        torch.set_num_threads(threads)
    model = ModelSource("folder", str(trained.folder), folder_digest(trained.folder)[0])
    data = DataSource(str(trained.calibration), "jsonl", "held out")
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
