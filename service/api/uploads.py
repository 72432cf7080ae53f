"""Uploads: a manifest first, then each missing blob as a raw body that can be resumed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from service.api.blob_stream import receive
from service.api.calibrations import calibration_answer
from service.api.context import Context, Ctx
from service.api.guarded import Guarded
from service.api.idempotency import Answer, IdempotencyKey, once
from service.api.intake import (
    check_uploaded_calibration,
    check_uploaded_model,
    missing_blobs,
    store_calibration,
    store_model,
)
from service.api.lookup import find_upload
from service.api.models import model_answer
from service.api.quotas import require_bytes
from service.api.resources import Blob, Calibration, Model, Upload
from service.db.repositories import uploads
from service.errors import Conflict, NotFound, TooLarge, Unprocessable, json_pointer
from service.failpoints import failpoint
from service.ingest.kinds import calibration_kind, check_model_files
from service.ingest.paths import check_paths
from service.records import UploadRecord
from service.states import UploadState
from service.wire import UploadRequest

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=Guarded)

UploadId = Annotated[str, Path(max_length=100)]
Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
UploadOffset = Annotated[
    int | None, Header(alias="Upload-Offset", ge=0, description="Bytes that have arrived before this body.")
]
RAW_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, response_model=Upload)
def create_upload(body: UploadRequest, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Declare the files of a model or calibration set; the answer lists the blobs that the server lacks.

    The same manifest again continues the open upload, with the bytes that have arrived.
    """
    _check_manifest(context, body)
    manifest = [file.model_dump() for file in body.files]

    def create(session: Session) -> Answer:
        upload = uploads.find_open(session, body.purpose, manifest, context.tenant)
        if upload is None:
            require_bytes(context, session, {file.sha256: file.size for file in body.files})
            upload = uploads.create(session, purpose=body.purpose, manifest=manifest, tenant=context.tenant)
        return Answer(201, _present(context, session, upload), {"Location": f"/v1/uploads/{upload.id}"})

    return once(context, key, "POST /v1/uploads", body.model_dump(mode="json"), create)


@router.get("/{upload_id}")
def get_upload(upload_id: UploadId, context: Ctx) -> Upload:
    """The upload and what is still missing."""
    with context.database.read() as session:
        return _present(context, session, find_upload(context, session, upload_id))


@router.delete("/{upload_id}", status_code=204)
def abandon_upload(upload_id: UploadId, context: Ctx) -> None:
    """Forget an open upload with the bytes that have arrived; blobs that are whole stay for others."""
    with context.database.write() as session:
        upload = find_upload(context, session, upload_id)
        if upload.state == UploadState.COMPLETE:
            raise Conflict(
                "upload-complete",
                f"An upload must be open to be abandoned. Got {upload_id}, which is complete. Delete "
                "the model or calibration set that it became.",
            )
        uploads.delete(session, upload_id)
    context.store.drop_partials(upload_id)


@router.head("/{upload_id}/blobs/{sha256}", status_code=204)
def blob_offset(upload_id: UploadId, sha256: Sha256, context: Ctx) -> Response:
    """How far a blob has come: Upload-Offset, Upload-Complete."""
    size, complete = _declared(context, upload_id, sha256)
    offset = size if complete else context.store.partial(upload_id, sha256).offset
    return _progress(offset, size, complete=complete)


@router.put("/{upload_id}/blobs/{sha256}", status_code=204, openapi_extra=RAW_BODY)
async def put_blob(upload_id: UploadId, sha256: Sha256, request: Request, context: Ctx) -> Response:
    """Send a whole blob in one body; what had arrived before is replaced."""
    return await _receive(context, request, upload_id, sha256, None)


@router.patch("/{upload_id}/blobs/{sha256}", status_code=204, openapi_extra=RAW_BODY)
async def patch_blob(
    upload_id: UploadId, sha256: Sha256, request: Request, context: Ctx, offset: UploadOffset = 0
) -> Response:
    """Send the rest of a blob from Upload-Offset on; a wrong offset is answered 409 with the right one."""
    return await _receive(context, request, upload_id, sha256, offset)


@router.post("/{upload_id}/complete", status_code=201, response_model=Model | Calibration)
def complete_upload(upload_id: UploadId, context: Ctx, key: IdempotencyKey = None) -> Response:
    """Check the files and make the model or calibration set; the same files give the same resource."""
    with context.database.read() as session:
        purpose = find_upload(context, session, upload_id).purpose
    route = f"POST /v1/uploads/{upload_id}/complete"
    if purpose == "model":
        model = check_uploaded_model(context, upload_id)
        return once(
            context, key, route, None, lambda session: model_answer(store_model(context, session, model))
        )
    calibration = check_uploaded_calibration(context, upload_id)
    return once(
        context,
        key,
        route,
        None,
        lambda session: calibration_answer(store_calibration(context, session, calibration)),
    )


async def _receive(
    context: Context, request: Request, upload_id: str, sha256: str, offset: int | None
) -> Response:
    size, complete = await run_in_threadpool(_declared, context, upload_id, sha256)
    if complete:
        return _progress(size, size, complete=True)
    partial = context.store.partial(upload_id, sha256)
    reached = await receive(request, partial, offset, size)
    if reached < size:
        return _progress(reached, size, complete=False)
    await run_in_threadpool(_record, context, sha256, size)
    return _progress(size, size, complete=True)


def _record(context: Context, sha256: str, size: int) -> None:
    failpoint("api.blob_written")
    with context.database.write() as session:
        uploads.record_blob(session, sha256, size, context.tenant)


def _declared(context: Context, upload_id: str, sha256: str) -> tuple[int, bool]:
    """The size that the manifest declares for a blob, and whether the tenant has sent it."""
    with context.database.read() as session:
        upload = find_upload(context, session, upload_id)
        complete = uploads.get_blob(session, sha256, context.tenant) is not None
    for file in upload.manifest:
        if file["sha256"] == sha256:
            return file["size"], complete
    raise NotFound(
        "blob-not-in-manifest",
        f"A blob must be one of the upload's manifest. Got {sha256}. Open an upload that lists it.",
    )


def _check_manifest(context: Context, body: UploadRequest) -> None:
    names = [file.path for file in body.files]
    check_paths(names)
    if body.purpose == "model":
        check_model_files(names)
    else:
        calibration_kind(names)
    sizes: dict[str, int] = {}
    for position, file in enumerate(body.files):
        if sizes.setdefault(file.sha256, file.size) != file.size:
            raise Unprocessable(
                "invalid-manifest",
                f"One digest must have one size. Got {file.size} and {sizes[file.sha256]} bytes for "
                f"{file.sha256}. Hash the files again.",
                pointer=json_pointer("files", position, "size"),
            )
    total, most = sum(sizes.values()), context.settings.max_upload_bytes
    if total > most:
        raise TooLarge(
            "too-large",
            f"An upload must have at most {most} bytes in all. Got {total}. Send a smaller model.",
        )


def _present(context: Context, session: Session, upload: UploadRecord) -> Upload:
    missing = missing_blobs(context, session, upload)
    return Upload.of(upload, [Blob(**blob) for blob in missing])


def _progress(offset: int, size: int, *, complete: bool) -> Response:
    headers = {
        "Upload-Offset": str(offset),
        "Upload-Length": str(size),
        "Upload-Complete": "?1" if complete else "?0",
        "Cache-Control": "no-store",
    }
    return Response(status_code=204, headers=headers)
