"""A control: layers in random order. A metric that does not beat it says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensitivity.estimators import keyed_generator

if TYPE_CHECKING:
    from sensitivity.choice import Choice, Measured


class Random:
    """u * 4^-bits, u the layer's sensitivity drawn from (0, 1): each bit more divides the error by 4."""

    def score(self, choice: Choice) -> Measured:
        """No model pass."""
        from sensitivity.choice import Measured

        drawn = float(keyed_generator((choice.seed, "random", choice.layer.name)).random())
        bits = 8 * choice.scheme.weight.storage(choice.layer.matrix).bytes / choice.layer.parameters
        return Measured(drawn * 4.0**-bits, None, 0)
