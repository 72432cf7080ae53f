"""The worker's side of a checkpoint job: writes the plan's weights into a folder and packs them as one file.

The folder is the only thing that worker and runner share: the plan comes in it, `progress` grows beside the
files, `result` is the archive (or the one file) when the unit ends.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from quant.apply import ApplyError
from quant.catalog import CHECKPOINTS
from quant.checkpoints import front
from quant.checkpoints.protocol import CheckpointError, Layout
from quant.checkpoints.source import Source
from quant.digest import FolderError
from quant.export.protocol import Deployment, ExportError
from quant.plan import Plan, parse_plan
from quant.safetensors_header import HeaderError
from sensitivity.errors import BadUnit, SessionError
from sensitivity.spec import NO_DATA, SessionSpec
from sensitivity.units import Unit, UnitResult, WriteUnit
from service.checkpoints import PLAN, PROGRESS, RESULT
from service.model_facts import model_facts

OUT = "out"
RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, for the database and the logs."""
BLOCK = 512
"""Tar stores files in whole blocks, each behind a header of one block or, with a long name or size, three."""


class CheckpointRefused(SessionError):  # noqa: N818 - says what happened
    """The plan's checkpoint cannot be written for this consumer or from this model."""

    kind = "checkpoint_refused"


class DiskFull(SessionError):  # noqa: N818 - says what happened
    """The disk has no room for the checkpoint."""

    kind = "disk_full"


class CheckpointWriter:
    """A session that answers a `WriteUnit`; its spec says where the model and the calibration data are."""

    def __init__(self, spec: SessionSpec) -> None:
        self._spec = spec

    def run(self, unit: Unit) -> UnitResult:
        """Facts: the layout, the provenance, and `bytes` of the result. Raises SessionError."""
        if not isinstance(unit, WriteUnit):
            raise BadUnit(f"a checkpoint writer must be asked to write. Got {unit.key!r}.")
        try:
            return self._write(unit, Path(unit.folder))
        except (CheckpointError, ExportError, ApplyError, FolderError, HeaderError) as error:
            raise CheckpointRefused(str(error)) from error

    def _write(self, unit: WriteUnit, folder: Path) -> UnitResult:
        plan = parse_plan((folder / PLAN).read_bytes())
        source = Source.open(self._spec.model.location)
        deployment = Deployment(plan, model_facts(source.folder, plan))
        layout = front.layout(unit.consumer, source, deployment, force=unit.force)
        _require_room(folder, layout)
        out = folder / OUT
        _clear(out)
        told = _Progress(folder / PROGRESS, len(plan.layers))
        found = self._from_calibration(plan)
        written = front.write(unit.consumer, source, deployment, out, force=unit.force, wrote=told, **found)
        if CHECKPOINTS[unit.consumer].writes == "folder":
            archive(out, folder / RESULT)
        else:
            os.replace(out, folder / RESULT)
        provenance = written.provenance.as_json()
        size = (folder / RESULT).stat().st_size
        return UnitResult(facts={"layout": layout.as_json(), "provenance": provenance, "bytes": size})

    def _from_calibration(self, plan: Plan) -> dict[str, Any]:
        if not plan.reads_calibration:
            return {}
        if self._spec.calibration == NO_DATA:
            raise CheckpointRefused("the plan's calibration data must be given. Got none. Send them again.")
        from service.plan_statistics import from_calibration

        return vars(from_calibration(plan, self._spec))


def archive(folder: Path, target: Path) -> None:
    """Move a folder's files into a tar archive without compression, sorted by name and without times or
    owners: equal files give equal bytes. Each file is removed as soon as it is in.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as packed:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with path.open("rb") as file:
                packed.addfile(member, file)
            path.unlink()
    folder.rmdir()


class _Progress:
    """Counts layers in a file that the runner reads."""

    def __init__(self, file: Path, total: int) -> None:
        self._file, self._total = file, total
        self._done: set[str] = set()

    def __call__(self, layer: str) -> None:
        self._done.add(layer)
        growing = self._file.with_suffix(".new")
        growing.write_text(f"{len(self._done)} {self._total}", encoding="utf-8")
        os.replace(growing, self._file)


def room_for(layout: Layout) -> int:
    """Bytes that writing and packing take at most: the files, the largest one twice, and the reserve."""
    largest = max(file.bytes for file in layout.files)
    return layout.bytes + largest + 4 * BLOCK * (len(layout.files) + 5) + RESERVE_BYTES


def _require_room(folder: Path, layout: Layout) -> None:
    free, needed = shutil.disk_usage(folder).free, room_for(layout)
    if free < needed:
        raise DiskFull(
            f"The server's disk must have {needed:,} bytes free for a checkpoint of {layout.bytes:,}."
            f" Got {free:,}. Delete jobs with checkpoints that are no longer needed, or make room."
        )


def _clear(place: Path) -> None:
    """Remove what a worker that died left behind."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
