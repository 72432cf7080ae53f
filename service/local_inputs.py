"""The user's own model and data where they are on this machine, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from quant.digest import file_digest, folder_digest
from sensitivity.calibration_check import check_calibration
from sensitivity.spec import NO_DATA, DataSource, ModelSource, SessionSpec
from service import one_off
from service.errors import Unprocessable
from service.executors.confine import Isolation
from service.ingest.kinds import PARQUET, calibration_kind
from service.ingest.model_folder import check_model
from service.ingest.parquet_text import jsonl_of
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
            f"Calibration data must be a .safetensors, .npz, .txt, .jsonl or .parquet file. Got "
            f"{str(path)!r}, which is no file. Check the path.",
        )
    kind = calibration_kind([path.name])
    if kind == PARQUET:
        path, kind = _as_jsonl(path), "jsonl"
    summary = check_calibration(path, kind)
    return LocalData(DataSource(str(path.absolute()), kind, file_digest(path)), summary)  # type: ignore[arg-type]


def _as_jsonl(path: Path) -> Path:
    """The rows of a Parquet file as a file of their own, which lasts as long as this process."""
    file = Path(_made().name) / f"{uuid4().hex}.jsonl"
    with file.open("xb") as lines:
        lines.writelines(jsonl_of(path, path.name, Isolation()))
    return file


@cache
def _made() -> TemporaryDirectory[str]:
    """Removed when this process ends."""
    return TemporaryDirectory(prefix="bitplan-data-")
