"""Mean squared change of the model's outputs with one layer quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class OutputMse:
    """Mean over samples, rows and outputs of (y - y_q)^2, in squared units of the output."""

    def score(self, choice: OutputChoice) -> Measured:
        """One pass over the scoring part."""
        from sensitivity.choice import measured_mean

        parts = []
        for pair in choice.pairs():
            errors = (pair.outputs.rows - pair.reference.rows).double().square().mean(-1)
            parts.append(pair.reference.means(errors))
        return measured_mean(np.concatenate(parts))
