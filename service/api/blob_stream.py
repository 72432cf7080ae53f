"""A request body into a partial upload: in constant memory, resumable wherever it breaks."""

from __future__ import annotations

from asyncio import timeout
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from sys import exc_info
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from service.errors import (
    BadRequest,
    Conflict,
    RequestTimeout,
    ServiceError,
    TooLarge,
)
from service.passing import disk_problem
from service.store.errors import BlobTooLarge, DigestMismatch, PartialBusy, WrongOffset
from service.store.partials import PartialUpload, PartialWriter

BUFFER_BYTES = 1 << 20
PATIENCE_SECONDS = 120.0
"""For each BUFFER_BYTES of a body, so that a slow one ends; what has arrived stays."""
T = TypeVar("T")


async def receive(request: Request, partial: PartialUpload, offset: int | None, size: int) -> int:
    """Append the body from `offset` (None: from the beginning, anew) and give the offset that was reached.

    A complete blob is verified and becomes visible. What arrived before the connection broke stays. Raises
    Conflict `wrong-offset`, `digest-mismatch` or `upload-busy`, TooLarge, RequestTimeout `body-too-slow`,
    InsufficientStorage.
    """
    try:
        _refuse_declared(request, partial.offset if offset else 0, size)
        if offset is None:
            await run_in_threadpool(partial.discard)
        async with _in_threads(partial.append(offset or 0, size)) as writer:
            await _copy(request, writer)
        if partial.offset == size:
            await run_in_threadpool(partial.commit, size)
            return size
        return partial.offset
    except ClientDisconnect:
        raise BadRequest(
            "body-cut-off", "The body must be complete. Got a broken connection. Resume it."
        ) from None
    except (WrongOffset, DigestMismatch, PartialBusy, BlobTooLarge, OSError) as error:
        raise _problem(error) from error


def _refuse_declared(request: Request, reached: int, size: int) -> None:
    """Refuse a body that says itself that it is too long, before it is read."""
    length = request.headers.get("Content-Length", "")
    if length.isdigit() and reached + int(length) > size:
        raise BlobTooLarge(size)


async def _copy(request: Request, writer: PartialWriter) -> None:
    """Write what arrives in pieces of about BUFFER_BYTES, the last one too when the body breaks off."""
    chunks, more = request.stream(), True
    while more:
        buffer = bytearray()
        try:
            more = await _fill(buffer, chunks)
        finally:
            if buffer:
                await run_in_threadpool(writer.write, bytes(buffer))


async def _fill(buffer: bytearray, chunks: AsyncGenerator[bytes]) -> bool:
    """Collect the next BUFFER_BYTES; False where the body ends. Raises RequestTimeout."""
    try:
        async with timeout(PATIENCE_SECONDS):
            while len(buffer) < BUFFER_BYTES:
                chunk = await anext(chunks, None)
                if chunk is None:
                    return False
                buffer += chunk
    except TimeoutError:
        raise RequestTimeout(
            "body-too-slow",
            f"A body must bring {BUFFER_BYTES} bytes every {PATIENCE_SECONDS:g} seconds. Got {len(buffer)}. "
            "Resume it from the offset that HEAD answers.",
            headers={"Connection": "close"},
        ) from None
    return True


@asynccontextmanager
async def _in_threads(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A blocking context manager, entered and left in worker threads."""
    value = await run_in_threadpool(manager.__enter__)
    try:
        yield value
    except BaseException:
        if not await run_in_threadpool(manager.__exit__, *exc_info()):
            raise
    else:
        await run_in_threadpool(manager.__exit__, None, None, None)


def _problem(error: Exception) -> ServiceError:
    match error:
        case WrongOffset():
            headers = {"Upload-Offset": str(error.expected), "Upload-Complete": "?0"}
            return Conflict("wrong-offset", str(error), extra={"offset": error.expected}, headers=headers)
        case DigestMismatch():
            return Conflict(
                "digest-mismatch", str(error), headers={"Upload-Offset": "0", "Upload-Complete": "?0"}
            )
        case PartialBusy():
            return Conflict("upload-busy", str(error), headers={"Retry-After": "1"})
        case BlobTooLarge():
            return TooLarge("too-large", str(error))
        case OSError() if (problem := disk_problem(error)) is not None:
            return problem
    raise error
