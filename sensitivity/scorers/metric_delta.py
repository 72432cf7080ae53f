"""Loss of the task's own quality with one layer quantized, as Qualcomm AIMET measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.evidence import SHARES

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class MetricDelta:
    """Mean over samples of how much worse the task's quality gets (accuracy, perplexity), at least 0."""

    def score(self, choice: Choice) -> Measured:
        """No pass beyond that of output_kl; the standard error is of the paired differences."""
        from sensitivity.choice import Measured, measured_mean

        worse = []
        for pair in choice.pairs():
            before, after = (choice.task.quality(o, pair.batch) for o in (pair.reference, pair.outputs))
            name = next(iter(before))
            worse.append((after[name] - before[name]) * (-1.0 if name in SHARES else 1.0))
        found = measured_mean(np.concatenate(worse))
        return Measured(max(found.value, 0.0), found.stderr, found.samples)
