"""What quantizing one layer does to the choice of experts (MoEQuant, Hu et al.; EAQuant, Fu et al., 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class RouterKl:
    """Mean over samples of the KL in nats between routers' distributions over experts, before and after."""

    def score(self, choice: Choice) -> Measured:
        """One pass over the scoring part. Raises MetricNotOffered for a model without routers."""
        from sensitivity.choice import measured_mean
        from sensitivity.routers import router_divergence

        pairs = choice.forwards.router_pairs("scoring", ((choice.layer.name, choice.scheme.name),))
        return measured_mean(np.concatenate([router_divergence(*pair) for pair in pairs]))
