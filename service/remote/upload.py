"""Sending files: only what the server does not have, and from where a broken connection left off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from quant.digest import folder_digest
from service.remote.transport import BUSY, ConnectionFailed, ProblemError, Transport, backoff, raise_problem

CHUNK = 1 << 20
OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class LocalFile:
    """A file to send, with its digest."""

    path: Path
    name: str
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Its line of the manifest."""
        return {"path": self.name, "size": self.size, "sha256": self.sha256}


def model_files(folder: Path) -> tuple[LocalFile, ...]:
    """The files that decide what the model computes; others (README, pictures, other data) stay at home.

    Raises FolderError for a folder without config.json or safetensors weights.
    """
    _, manifest = folder_digest(folder)
    return tuple(
        LocalFile(folder / entry["path"], entry["path"], entry["size"], entry["sha256"]) for entry in manifest
    )


def local_file(path: Path) -> LocalFile:
    """A file with its size and SHA-256, read once in pieces."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(path, 0):
        digest.update(chunk)
        size += len(chunk)
    return LocalFile(path, path.name, size, digest.hexdigest())


def upload(
    transport: Transport, purpose: str, files: Sequence[LocalFile], on_bytes: OnBytes | None = None
) -> dict[str, Any]:
    """Send the files and give the resource that they became; `on_bytes(done, total)` counts bytes that
    the server lacked, as they go out, from where a broken connection left off.
    """
    manifest = {"purpose": purpose, "files": [file.as_json() for file in files]}
    resource = transport.post("/v1/uploads", manifest)
    by_digest = {file.sha256: file for file in files}
    total = sum(blob["size"] for blob in resource["missing"])
    before = 0
    for blob in resource["missing"]:
        path = f"/v1/uploads/{resource['id']}/blobs/{blob['sha256']}"
        told = partial(_tell, on_bytes, before, total)
        _send_blob(transport, path, by_digest[blob["sha256"]], told)
        before += blob["size"]
        told(blob["size"])
    completed: dict[str, Any] = transport.post(f"/v1/uploads/{resource['id']}/complete")
    return completed


def _tell(on_bytes: OnBytes | None, before: int, total: int, offset: int) -> None:
    if on_bytes:
        on_bytes(before + offset, total)


def _send_blob(transport: Transport, path: str, file: LocalFile, told: Callable[[int], None]) -> None:
    """PATCH from the server's offset; after each broken connection ask for the offset again."""
    for attempt in range(transport.retries + 1):
        head = transport.send("HEAD", path)
        if head.headers.get("Upload-Complete") == "?1":
            return
        try:
            response = _patch(transport, path, file, int(head.headers["Upload-Offset"]), told)
        except httpx2.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if _accepted(response):
                return
            problem = f"HTTP status {response.status_code}"
        transport.pause(backoff(attempt))
    raise ConnectionFailed(
        f"{file.name} must reach the server. Got {problem} after {transport.retries + 1} attempts. "
        "Run the same command again: it goes on from the bytes that arrived."
    )


def _accepted(response: httpx2.Response) -> bool:
    """Whether the blob is complete; a busy server, a moved offset, a body that came too slowly or
    that the server has not yet seen break off, is worth another try.
    """
    if response.status_code in BUSY:
        return False
    try:
        raise_problem(response)
    except ProblemError as problem:
        if problem.slug in ("wrong-offset", "upload-busy", "body-too-slow"):
            return False
        raise
    return response.headers.get("Upload-Complete") == "?1"


def _patch(
    transport: Transport, path: str, file: LocalFile, offset: int, told: Callable[[int], None]
) -> httpx2.Response:
    headers: Mapping[str, str] = {
        "Upload-Offset": str(offset),
        "Content-Length": str(file.size - offset),
        "Content-Type": "application/octet-stream",
    }
    content = _chunks(file.path, offset, told)
    return transport.http.request("PATCH", path, content=content, headers=headers)


def _chunks(path: Path, offset: int, told: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The file from `offset` on in pieces of CHUNK; `told` how far it has been handed over."""
    with path.open("rb") as file:
        file.seek(offset)
        told(offset)
        while chunk := file.read(CHUNK):
            yield chunk
            offset += len(chunk)
            told(offset)
