"""A model on its own, before anybody sends data: can it be built, and what of it can be quantized."""

from __future__ import annotations

import torch

from quant.inventory import AlreadyQuantized, NothingToQuantize, take_inventory
from quant.patterns import PatternError
from sensitivity.calibration import placement
from sensitivity.catalog import TASKS
from sensitivity.errors import BadPattern, BadUnit, ModelAlreadyQuantized, ModelHasNothingToQuantize
from sensitivity.model_loading import load_model, model_digest
from sensitivity.spec import SessionSpec
from sensitivity.units import InspectUnit, Unit, UnitResult


class ModelCheck:
    """Builds the model of `spec` and answers an `InspectUnit`; the calibration data of `spec` are not read.

    Raises SessionError when the model cannot be built, is quantized already, or has nothing to quantize.
    """

    def __init__(self, spec: SessionSpec) -> None:
        torch.set_num_threads(spec.threads)
        loaded = load_model(spec.model, spec.task, torch.device("cpu"))
        self._model, self._task = loaded.model, loaded.task

    def run(self, unit: Unit) -> UnitResult:
        """Facts: inventory (without MACs: those need data), task, divergence, dtype, digest."""
        if not isinstance(unit, InspectUnit):
            raise BadUnit(f"a model check must be asked to inspect. Got {unit.key!r}.")
        try:
            inventory = take_inventory(self._model, include=unit.include, exclude=unit.exclude)
        except AlreadyQuantized as error:
            raise ModelAlreadyQuantized(str(error)) from error
        except NothingToQuantize as error:
            raise ModelHasNothingToQuantize(str(error)) from error
        except PatternError as error:
            raise BadPattern(str(error)) from error
        facts = {
            "inventory": inventory.as_json(),
            "task": self._task,
            "divergence": TASKS[self._task].divergence,
            "dtype": str(placement(self._model)[1]).removeprefix("torch."),
            "digest": model_digest(self._model),
        }
        return UnitResult((), {}, facts)
