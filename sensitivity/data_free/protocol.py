"""What makes calibration data from a model alone."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from sensitivity.units import MakeUnit


class Maker(Protocol):
    """Makes one batch of samples; the same unit gives the same samples."""

    def make(self, model: nn.Module, unit: MakeUnit) -> dict[str, Tensor]:
        """Inputs by name, (unit.stop - unit.start, ...). Raises BadCalibration if it cannot."""
