"""Divergence per size: small layers count for more (BitsFusion, Sui et al. 2024, arXiv:2406.04333)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured

ETA = 0.3


class SizeNormalized:
    """output_kl * P^-0.3, P the layer's number of weights."""

    def score(self, choice: Choice) -> Measured:
        """No pass beyond that of output_kl."""
        from sensitivity.choice import measured_mean

        found = measured_mean(choice.divergence)
        factor = choice.layer.parameters**-ETA
        assert found.stderr is not None
        scaled = replace(found, value=found.value * factor, stderr=found.stderr * factor)
        return replace(scaled, per_sample=choice.divergence * factor)
