"""Large files from a server: continued where a connection broke, whole or absent, checked by their digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from service.remote.transport import ClientError, Transport, backoff, is_busy, raise_problem, retry_after

CHUNK_BYTES = 1 << 20


def download(transport: Transport, path: str, query: Mapping[str, Any], target: Path) -> None:
    """Write the answer to `target`, a new file. Raises ProblemError, ConnectionFailed, ClientError.

    The server's ETag must be the SHA-256 digest of the file.
    """
    partial = target.with_name(f".{target.name}.download")
    partial.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        etag = _fetch(transport, path, query, partial)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if etag != f'"{found}"':
            raise ClientError(f"The file must have the digest {etag}. Got {found}. Download it again.")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(transport: Transport, path: str, query: Mapping[str, Any], partial: Path) -> str | None:
    """Append until the file is whole; every attempt goes on from what is there. Gives the ETag."""
    etag: str | None = None
    for attempt in range(transport.retries + 1):
        reached = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={reached}-", "If-Range": etag} if reached and etag else {}
        try:
            with transport.http.stream("GET", path, params=dict(query), headers=headers) as answer:
                if is_busy(answer) and attempt < transport.retries:
                    transport.pause(retry_after(answer) or backoff(attempt))
                    continue
                if answer.status_code >= 400:
                    answer.read()
                raise_problem(answer)
                etag = answer.headers.get("ETag")
                with partial.open("ab" if answer.status_code == 206 else "wb") as file:
                    for piece in answer.iter_bytes():
                        file.write(piece)
                return etag
        except httpx2.TransportError as error:
            if attempt == transport.retries:
                raise transport.unreachable(error) from error
            transport.pause(backoff(attempt))
    raise AssertionError("unreachable: the last attempt returns or raises")


def unpack(archive: Path, folder: Path) -> None:
    """The plain files of a tar archive as a new folder, whole or absent. Raises ClientError for others."""
    growing = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:") as packed:
            for member in packed:
                source = packed.extractfile(member) if member.isreg() else None
                if source is None or Path(member.name).name != member.name or member.name in ("", ".", ".."):
                    raise ClientError(f"The archive must hold plain files only. Got {member.name!r:.100}.")
                with (growing / member.name).open("xb") as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
        if folder.is_dir():
            folder.rmdir()
        os.replace(growing, folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
