"""Rise of the user's own measure with one layer quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sensitivity.catalog import USER_METRIC

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class UserMetricDelta:
    """Mean over samples of how much larger the user's measure gets, at least 0."""

    def score(self, choice: OutputChoice) -> Measured:
        """No pass beyond that of output_kl; the standard error is of the paired differences."""
        from sensitivity.choice import measured_mean

        rises = []
        for pair in choice.pairs():
            both = (pair.reference, pair.outputs)
            before, after = (choice.task.quality(o, pair.batch, pair.reference)[USER_METRIC] for o in both)
            rises.append(after - before)
        found = measured_mean(np.concatenate(rises))
        return replace(found, value=max(found.value, 0.0))
