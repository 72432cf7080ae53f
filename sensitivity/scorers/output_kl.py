"""Divergence of the model's outputs with one layer quantized (ZeroQ, Cai et al. 2020, arXiv:2001.00281)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class OutputKl:
    """Mean over samples of the task's divergence: KL in nats, 1 - cosine, or relative squared error."""

    def score(self, choice: OutputChoice) -> Measured:
        """One pass over the scoring part."""
        from sensitivity.choice import measured_mean

        return measured_mean(choice.divergence)
