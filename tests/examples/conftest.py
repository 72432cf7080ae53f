"""The demo's language model, trained for a while, for all modules that look at it."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def script() -> Any:
    """The script that trains the demo's models; needs the demo extra."""
    from examples import train_demo_models

    return train_demo_models


@pytest.fixture(scope="session")
def trained_lm(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and calibration file of the demo's language model after a third of its training."""
    import torch

    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "LM_STEPS", script.LM_STEPS // 3)
            return script.train_lm(tmp_path_factory.mktemp("models"))
    finally:
        torch.set_num_threads(threads)
