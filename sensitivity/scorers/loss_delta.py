"""Rise of the loss against the truth with one layer quantized (AdaQuant, Hubara et al. 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class LossDelta:
    """Mean over samples of loss_q - loss in nats, at least 0: chance may let a layer gain by quantizing."""

    def score(self, choice: OutputChoice) -> Measured:
        """No pass beyond that of output_kl; the standard error is of the paired differences."""
        from sensitivity.choice import measured_mean

        differences = []
        for pair in choice.pairs():
            before = choice.task.losses(pair.reference, pair.batch)
            differences.append(choice.task.losses(pair.outputs, pair.batch) - before)
        found = measured_mean(np.concatenate(differences))
        return replace(found, value=max(found.value, 0.0))
