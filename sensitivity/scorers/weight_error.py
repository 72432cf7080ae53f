"""Squared error of the quantized weights: the baseline that needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class WeightError:
    """||dW||^2, summed in float64."""

    def score(self, choice: Choice) -> Measured:
        """No model pass."""
        from sensitivity.choice import Measured
        from sensitivity.contractions import squared_error

        return Measured(squared_error(choice.weights, choice.layer.name, choice.scheme.name), None, 0)
