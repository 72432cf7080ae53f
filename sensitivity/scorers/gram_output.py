"""Inner products of output changes: a quadratic model of any plan's divergence (docs/metrics.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice


class GramOutput:
    """Half the mean squared change of the outputs in their own metric, and a sketch of the change.

    The value is the diagonal of A in x'Ax. `arrays["sketch"]` (float32, 1-D) holds the change itself, or a
    random projection of it for large outputs; sensitivity.gram.gram_matrix makes A from all sketches.
    """

    def score(self, choice: OutputChoice) -> Measured:
        """No pass beyond that of output_kl."""
        import torch

        from sensitivity.choice import measured_mean
        from sensitivity.sketch import Sketch

        sketch: Sketch | None = None
        halves = []
        for pair in choice.pairs():
            change = choice.task.change(pair.reference, pair.outputs)
            halves.append(pair.reference.sums(change.square().sum(-1, dtype=torch.float64)) / 2)
            sketch = sketch or Sketch(choice.forwards.rows("scoring"), change.shape[-1], choice.seed)
            sketch.add(change)
        per_sample = np.concatenate(halves)
        assert sketch is not None
        scale = (2 * len(per_sample)) ** -0.5
        return measured_mean(per_sample, {"sketch": (sketch.values * scale).astype(np.float32)})
