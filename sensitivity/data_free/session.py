"""A session that makes calibration data: it holds the model and reads no data."""

from __future__ import annotations

import torch

from sensitivity.catalog import DATA_FREE
from sensitivity.errors import BadUnit
from sensitivity.model_loading import available_device, load_model
from sensitivity.spec import SessionSpec
from sensitivity.units import MakeUnit, Unit, UnitResult


class MakingSession:
    """Builds the model of `spec` and answers `MakeUnit`s; the calibration data of `spec` are not read.

    Raises SessionError when the model cannot be built or the device is not there.
    """

    def __init__(self, spec: SessionSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._model = load_model(spec.model, spec.task, available_device(spec.device)).model

    def run(self, unit: Unit) -> UnitResult:
        """Arrays: the inputs by name. Raises BadUnit and BadCalibration."""
        if not isinstance(unit, MakeUnit):
            raise BadUnit(f"this session must be asked to make data. Got {unit.key!r}.")
        if unit.method not in DATA_FREE:
            raise BadUnit(f"a method must be one of {', '.join(DATA_FREE)}. Got {unit.method!r}.")
        made = DATA_FREE[unit.method].load().make(self._model, unit)
        return UnitResult(
            (),
            {
                name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
                for name, tensor in made.items()
            },
            {},
        )
