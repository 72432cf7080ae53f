"""The sessions that give a plan's quantizers the statistics they had when the plan was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant.plan import Plan
from sensitivity.spec import ModelSource, SessionSpec
from service.local_inputs import file_data

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf


def statistics_spec(plan: Plan, model: ModelSource, file: Path, *, force: bool = False) -> SessionSpec:
    """How the plan's calibration data are read: as its document says.

    Raises ValueError when the document does not say, or the file is not the plan's (unless `force`).
    """
    if plan.calibration is None:
        raise ValueError(
            "Plan must say how its calibration data were read. Got a plan without a calibration section."
            " Export the plan of a search again."
        )
    data = file_data(file).source
    if data.digest != plan.digests.calibration and not force:
        raise ValueError(
            f"--calibration must be the file that the plan was made with, {plan.digests.calibration}."
            f" Got {data.digest}. Pass that file, or --force."
        )
    return SessionSpec(model=model, calibration=data, include=tuple(plan.layers), **asdict(plan.calibration))


@dataclass(frozen=True)
class FromCalibration:
    """What a plan needs from its calibration data: statistics of inputs by layer, and corrected tensors."""

    inputs: InputsOf
    corrected: Mapping[str, Tensor]


def from_calibration(plan: Plan, spec: SessionSpec) -> FromCalibration:
    """By a session in this process, as it was when the plan was measured. Raises SessionError."""
    from sensitivity.session import Session

    session = Session(spec)
    corrected = session.corrections.tensors(plan.weights.items(), plan.corrections or ())
    return FromCalibration(session.inputs, corrected)
