"""Loss of the task's own quality with one layer quantized, as Qualcomm AIMET measures it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sensitivity.evidence import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class MetricDelta:
    """Mean over samples of how much worse the task's quality gets (accuracy, perplexity), at least 0."""

    def score(self, choice: OutputChoice) -> Measured:
        """No pass beyond that of output_kl; the standard error is of the paired differences."""
        from sensitivity.choice import measured_mean

        worse = []
        for pair in choice.pairs():
            both = (pair.reference, pair.outputs)
            before, after = (choice.task.quality(o, pair.batch, pair.reference) for o in both)
            name = next(iter(before))
            worse.append((after[name] - before[name]) * (-1.0 if name in HIGHER_IS_BETTER else 1.0))
        found = measured_mean(np.concatenate(worse))
        return replace(found, value=max(found.value, 0.0))
