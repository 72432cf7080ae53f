"""From files that have arrived to a model or a calibration set: everything that can be checked without
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import structlog
from sqlalchemy.orm import Session

from quant.digest import digest, manifest_digest
from sensitivity.calibration_check import check_calibration
from service.api.context import Context
from service.api.lookup import find_upload
from service.api.quotas import require_bytes, require_job
from service.db.repositories import calibrations, jobs, models, uploads
from service.errors import Conflict, Unprocessable
from service.executors.isolation import isolation_of
from service.hub.reference import HubReference
from service.ingest.kinds import PARQUET, calibration_kind
from service.ingest.local_folder import allowed_folder, model_files_in, open_plain
from service.ingest.model_folder import check_model
from service.ingest.parquet_text import jsonl_of
from service.records import HUB, CalibrationRecord, ModelRecord, UploadRecord
from service.states import InputState, JobKind
from service.store.blobs import CHUNK_BYTES

log = structlog.get_logger()
Files = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files passed the static checks; `files` are path, size and sha256."""

    source: Mapping[str, Any]
    files: Files
    summary: Mapping[str, Any]
    upload: str | None

    @property
    def digest(self) -> str:
        """Identifies the content, as `folder_digest` does for the same files in a folder."""
        return manifest_digest(self.files)


@dataclass(frozen=True)
class CheckedCalibration:
    """A calibration file that passed the static checks; `sent` is the file that it was made from, if another
    one.
    """

    file: Mapping[str, Any]
    kind: str
    summary: Mapping[str, Any]
    upload: str
    sent: Mapping[str, Any] | None = None


def missing_blobs(context: Context, session: Session, upload: UploadRecord) -> list[dict[str, Any]]:
    """The blobs of the manifest that this tenant has not sent, each once, as sha256 and size."""
    wanted = {file["sha256"]: file["size"] for file in upload.manifest}
    known = uploads.known_blobs(session, wanted, context.tenant)
    return [{"sha256": sha256, "size": size} for sha256, size in wanted.items() if sha256 not in known]


def check_uploaded_model(context: Context, upload_id: str) -> CheckedModel:
    """Check the files of an upload against each other; raises what is wrong with them."""
    upload = _arrived(context, upload_id, "model")
    files = tuple(dict(file) for file in upload.manifest)
    facts = check_model({file["path"]: context.store.path(file["sha256"]) for file in files})
    return CheckedModel(
        {"kind": "upload", "upload": upload.id, "files": list(files)}, files, facts.as_json(), upload.id
    )


def check_folder_model(context: Context, folder: str) -> CheckedModel:
    """Copy a server-side folder into the store and check the copies, which nobody can change afterwards."""
    place = allowed_folder(folder, context.settings.model_folders)
    paths, left_out = model_files_in(place)
    check_model({path.name: path for path in paths})
    files = tuple(_copied(context, path) for path in paths)
    facts = check_model({file["path"]: context.store.path(file["sha256"]) for file in files})
    source = {"kind": "folder", "folder": str(place), "files": list(files), "left_out": list(left_out)}
    return CheckedModel(source, files, facts.as_json(), None)


def store_model(context: Context, session: Session, checked: CheckedModel) -> ModelRecord:
    """The model of these files: the one that is there, or a new one with a job that verifies it. One whose
    job ended without a word about it (cancelled) gets another job.
    """
    if checked.upload is not None:
        _require_there(context, session, checked.upload)
        uploads.complete(session, checked.upload, context.tenant)
    for file in checked.files:
        uploads.record_blob(session, file["sha256"], file["size"], context.tenant)
    known = models.find_by_digest(session, checked.digest, context.tenant)
    if known is not None:
        _verify_again(context, session, known, {"model": known.id})
        return known
    require_bytes(context, session, {file["sha256"]: file["size"] for file in checked.files})
    require_job(context, session)
    model = models.create(
        session, source=checked.source, digest=checked.digest, summary=checked.summary, tenant=context.tenant
    )
    _queue_verification(context, session, {"model": model.id})
    return model


def store_hub_model(context: Context, session: Session, wanted: HubReference) -> ModelRecord:
    """The model of this commit: the one that is there, or a new one with a job that fetches and verifies it.

    A model whose job ended without a word about it (cancelled) gets another job.
    """
    known = models.find_by_source(session, HUB, wanted.as_json(), context.tenant)
    model = known or models.create(
        session,
        source={"kind": HUB, **wanted.as_json()},
        digest=digest(wanted.as_json()),
        tenant=context.tenant,
    )
    _verify_again(context, session, model, {"model": model.id, "quota": context.access.key_id is not None})
    return model


def _verify_again(context: Context, session: Session, model: ModelRecord, request: Mapping[str, Any]) -> None:
    """Queue a job for a model that waits for one."""
    if model.state == InputState.VERIFYING and not _is_on_its_way(context, session, model):
        require_job(context, session)
        _queue_verification(context, session, request)


def _is_on_its_way(context: Context, session: Session, model: ModelRecord) -> bool:
    return any(
        job.kind == JobKind.VERIFY_MODEL and job.request["model"] == model.id
        for job in jobs.unfinished(session, tenant=context.tenant)
    )


def _queue_verification(context: Context, session: Session, request: Mapping[str, Any]) -> None:
    job = jobs.create(
        session,
        kind=JobKind.VERIFY_MODEL,
        request=request,
        request_digest=digest(request),
        tenant=context.tenant,
    )
    log.info("job.accepted", job=job.id, kind=str(job.kind), state=str(job.state))


def check_uploaded_calibration(context: Context, upload_id: str) -> CheckedCalibration:
    """Check the one file of an upload; raises what is wrong, with the row or tensor."""
    upload = _arrived(context, upload_id, "calibration")
    file, sent = dict(upload.manifest[0]), None
    kind = calibration_kind([entry["path"] for entry in upload.manifest])
    if kind == PARQUET:
        file, sent, kind = _as_jsonl(context, file), file, "jsonl"
    try:
        summary = check_calibration(context.store.path(file["sha256"]), kind)
    except ValueError as error:
        message = str(error).replace(file["sha256"], file["path"])
        raise Unprocessable("invalid-calibration", message, pointer="/files/0") from None
    return CheckedCalibration(file, kind, summary, upload.id, sent)


def _as_jsonl(context: Context, file: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a Parquet file as a file of their own in the store."""
    lines = jsonl_of(context.store.path(file["sha256"]), file["path"], isolation_of(context.settings))
    sha256 = context.store.put(lines)
    path = str(PurePosixPath(file["path"]).with_suffix(".jsonl"))
    return {"path": path, "size": context.store.size(sha256), "sha256": sha256}


def store_calibration(context: Context, session: Session, checked: CheckedCalibration) -> CalibrationRecord:
    """The calibration set of this file: the one that is there, or a new one, ready at once."""
    _require_there(context, session, checked.upload)
    uploads.complete(session, checked.upload, context.tenant)
    sha256 = checked.file["sha256"]
    source: dict[str, Any] = {"kind": "upload", "upload": checked.upload, "files": [dict(checked.file)]}
    known = calibrations.find_by_digest(session, sha256, context.tenant)
    if known is not None and known.kind == checked.kind:
        return known
    if checked.sent is not None:
        require_bytes(context, session, {sha256: checked.file["size"]})
        uploads.record_blob(session, sha256, checked.file["size"], context.tenant)
        source["sent"] = dict(checked.sent)
    return calibrations.create(
        session,
        source=source,
        digest=sha256,
        kind=checked.kind,
        state=InputState.READY,
        summary=checked.summary,
        tenant=context.tenant,
    )


def _arrived(context: Context, upload_id: str, purpose: str) -> UploadRecord:
    with context.database.read() as session:
        upload = find_upload(context, session, upload_id)
    if upload.purpose != purpose:
        raise Unprocessable(
            "wrong-purpose",
            f"The upload must have been opened for a {purpose}. Got one for a {upload.purpose}. Open "
            "another.",
            pointer="/upload",
        )
    with context.database.read() as session:
        _require_there(context, session, upload.id)
    return upload


def _require_there(context: Context, session: Session, upload_id: str) -> None:
    """Raise Conflict unless the store has every blob of the upload: checked again where a row is made that
    refers to them, since what nothing referred to may have been collected in between.
    """
    missing = missing_blobs(context, session, find_upload(context, session, upload_id))
    if missing:
        raise Conflict(
            "upload-incomplete",
            f"Every blob of an upload must have arrived. Got {len(missing)} missing. Send them to "
            f"/v1/uploads/{upload_id}/blobs/{{sha256}}.",
            extra={"missing": missing},
        )


def _copied(context: Context, path: Path) -> dict[str, Any]:
    with open_plain(path) as file:
        sha256 = context.store.put(iter(lambda: file.read(CHUNK_BYTES), b""))
    return {"path": path.name, "size": context.store.size(sha256), "sha256": sha256}
