"""The user's own model and data where they are on this machine, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.digest import file_digest, folder_digest
from sensitivity.calibration_check import check_calibration
from sensitivity.spec import NO_DATA, DataSource, ModelSource, SessionSpec
from service import one_off
from service.errors import Unprocessable
from service.ingest.kinds import calibration_kind
from service.ingest.model_folder import check_model
from service.runner.verify_job import MODEL_CHECK
from service.settings import Settings


@dataclass(frozen=True)
class LocalData:
    """A calibration file that was read through: where it is, and what it holds."""

    source: DataSource
    summary: dict[str, Any]


def folder_source(path: Path) -> ModelSource:
    """The model of a Hugging Face folder. Raises ServiceError or FolderError."""
    content, manifest = folder_digest(path)
    check_model({entry["path"]: path / entry["path"] for entry in manifest})
    return ModelSource("folder", str(path.absolute()), content)


def factory_source(name: str, settings: Settings) -> ModelSource:
    """The model that the user's own function `package.module:function` returns; a worker builds it once to
    know its digest. Raises ServiceError.
    """
    facts = one_off.inspect(settings, SessionSpec(ModelSource("factory", name, ""), NO_DATA), MODEL_CHECK)
    return ModelSource("factory", name, str(facts["digest"]))


def file_data(path: Path) -> LocalData:
    """The samples of a calibration file. Raises ServiceError, or ValueError naming the row."""
    if not path.is_file():
        raise Unprocessable(
            "calibration-not-found",
            f"Calibration data must be a .safetensors, .npz, .txt or .jsonl file. Got {str(path)!r}, which "
            "is no file. Check the path.",
        )
    kind = calibration_kind([path.name])
    summary = check_calibration(path, kind)
    return LocalData(DataSource(str(path.absolute()), kind, file_digest(path)), summary)  # type: ignore[arg-type]
