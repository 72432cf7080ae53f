"""Structural similarity of the model's images with one layer quantized (as MixDQ, Zhao et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class Ssim:
    """Mean over samples of the task's structural similarity to the full-precision images; more is better."""

    def score(self, choice: Choice) -> Measured:
        """No pass beyond that of output_kl."""
        from sensitivity.choice import measured_mean

        found = [choice.task.quality(pair.outputs, pair.batch, pair.reference) for pair in choice.pairs()]
        return measured_mean(np.concatenate([quality["ssim"] for quality in found]))
