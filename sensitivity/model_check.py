"""A model on its own, before anybody sends data: can it be built, and what of it can be quantized."""

from __future__ import annotations

import torch

from sensitivity.calibration import dtype_name
from sensitivity.catalog import TASKS
from sensitivity.errors import BadUnit
from sensitivity.inventory import inventory_of
from sensitivity.kv_cache import geometry_json
from sensitivity.model_loading import load_model, load_skeleton, model_digest
from sensitivity.spec import SessionSpec
from sensitivity.units import InspectUnit, Unit, UnitResult


class ModelCheck:
    """Builds the model of `spec` and answers an `InspectUnit`; the calibration data of `spec` are not read.

    A folder's model is built on the meta device first: nothing is allocated for tensors that its files lack.

    Raises SessionError when the model cannot be built, is quantized already, or has nothing to quantize.
    """

    def __init__(self, spec: SessionSpec) -> None:
        torch.set_num_threads(spec.threads)
        if spec.model.kind == "folder":
            load_skeleton(
                spec.model.location
            )  # a configuration that asks for more than the files hold ends here
        loaded = load_model(spec.model, spec.task, torch.device("cpu"))
        self._model, self._task = loaded.model, loaded.task

    def run(self, unit: Unit) -> UnitResult:
        """Facts: inventory (without MACs: those need data), task, divergence, geometry, dtype, digest."""
        if not isinstance(unit, InspectUnit):
            raise BadUnit(f"a model check must be asked to inspect. Got {unit.key!r}.")
        facts = {
            "inventory": inventory_of(self._model, unit.include, unit.exclude).as_json(),
            "task": self._task,
            "divergence": TASKS[self._task].divergence,
            "geometry": geometry_json(self._model),
            "dtype": dtype_name(self._model),
            "digest": model_digest(self._model),
        }
        return UnitResult((), {}, facts)
