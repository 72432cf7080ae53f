"""The files of a commit into the store: the small ones first, then the large ones, each one verified.

    files = announced(connection, store, reference, most_bytes)      listed, checked, small ones stored
    fetch(connection, store, reference, files.files, on_bytes)       the rest, resumed where it broke

Both may be interrupted anywhere and repeated: what is whole is in the store, what is not goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quant.digest import digest
from service.errors import InsufficientStorage, Unavailable
from service.hub.connection import LEAST_BYTES, Answer, HubAway, HubConnection
from service.hub.listing import HubFile, mismatch, read_listing, too_large
from service.hub.reference import HubReference
from service.ingest.model_folder import check_small_files
from service.ingest.weights import choose
from service.passing import FULL
from service.store.blobs import BlobStore
from service.store.errors import BlobTooLarge, DigestMismatch, PartialBusy, WrongOffset

TRIES = 6
"""Attempts in a row that bring less than LEAST_BYTES."""
FIRST_WAIT = 1.0
BUSY_SECONDS = 1.0

T = TypeVar("T")
OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Announced:
    """What makes the model: `files` are path, size and sha256; `left_out` other weights of the folder."""

    files: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]


@dataclass
class Patience:
    """How often to ask again: `wait` sleeps and may raise, `seconds` are for everything together."""

    wait: Callable[[float], None] = time.sleep
    seconds: float = 24 * 3600.0
    tries: int = TRIES
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.seconds

    def persist(self, action: Callable[[], T], gained: Callable[[], int] = lambda: 0) -> T:
        """What `action` gives, tried again with growing pauses while the hub is away; `gained` bytes of an
        attempt that were many begin the count anew. Raises Unavailable `hub-unavailable`.
        """
        failed = 0
        while True:
            before = gained()
            try:
                return action()
            except HubAway as away:
                failed = 1 if gained() - before >= LEAST_BYTES else failed + 1
                pause = away.wait_seconds or FIRST_WAIT * 2 ** (failed - 1)
                if failed >= self.tries or time.monotonic() + pause > self._until:
                    raise Unavailable(
                        "hub-unavailable",
                        f"The hub must send its files. Got {away} after {failed} attempts. Send the same "
                        "request again later: it goes on from the bytes that arrived.",
                    ) from None
                self.wait(pause)

    def require_time(self) -> None:
        """Raise Unavailable `hub-unavailable` where the time for everything is over."""
        if time.monotonic() > self._until:
            raise Unavailable(
                "hub-unavailable",
                f"The hub must send its files within {self.seconds / 3600:g} hours. Got fewer. Send the same "
                "request again: it goes on from the bytes that arrived; the operator may raise "
                "BITPLAN_HUB_HOURS.",
            )


def announced(
    connection: HubConnection,
    store: BlobStore,
    reference: HubReference,
    most_bytes: int,
    patience: Patience,
) -> Announced:
    """List the commit, fetch and check its small files (whose SHA-256 the hub does not tell), and choose its
    weights. Nothing large is asked for. Raises ServiceError.
    """
    listing = patience.persist(lambda: connection.read(reference.info_path()))
    found = {file.name: file for file in read_listing(listing, reference, most_bytes)}
    digests = {
        name: _plain(connection, store, reference, file, patience)
        for name, file in found.items()
        if file.is_plain and not name.endswith(".safetensors")
    }

    def small(name: str) -> Path:
        if name not in digests:
            digests[name] = _whole(connection, store, reference, _entry(found[name]), patience)
        return store.path(digests[name])

    chosen = choose(sorted(found), lambda name: small(name).read_bytes())
    kept = [found[name] for name in chosen.kept]
    total = sum(file.size for file in kept)
    if total > most_bytes:
        raise too_large(total, most_bytes)
    check_small_files({name: small(name) for name in chosen.kept if not name.endswith(".safetensors")})
    for file in kept:
        if file.is_plain and file.name not in digests:
            digests[file.name] = _plain(connection, store, reference, file, patience)
    files = tuple(_entry(file) | {"sha256": digests.get(file.name, file.sha256)} for file in kept)
    return Announced(files, chosen.left_out)


def fetch(
    connection: HubConnection,
    store: BlobStore,
    reference: HubReference,
    files: Sequence[dict[str, Any]],
    patience: Patience,
    on_bytes: OnBytes = lambda done, total: None,
) -> None:
    """Bring every file that the store lacks; `on_bytes(done, total)` counts the bytes of all. Raises
    ServiceError.
    """
    total, done = sum(file["size"] for file in files), 0
    for file in files:
        on_bytes(done, total)
        _whole(connection, store, reference, file, patience, partial(_tell, on_bytes, done, total))
        done += file["size"]
    on_bytes(done, total)


def _tell(on_bytes: OnBytes, before: int, total: int, now: int) -> None:
    on_bytes(before + now, total)


def partial_id(reference: HubReference) -> str:
    """Under which pieces of its files wait: the same for every attempt."""
    return f"hub_{digest(reference.as_json())}"


def _entry(file: HubFile) -> dict[str, Any]:
    return {"path": file.name, "size": file.size, "sha256": file.sha256}


def _plain(
    connection: HubConnection, store: BlobStore, reference: HubReference, file: HubFile, patience: Patience
) -> str:
    """Fetch a file that is in git itself, verify its git id, and give its SHA-256."""

    def once() -> str:
        with _stored(), connection.get(reference.file_path(file.name)) as answer:
            _require_answer(answer, reference, file.name, file.size)
            return store.put(_verified(answer.pieces(), file), limit=file.size)

    return patience.persist(once)


def _verified(pieces: Iterator[bytes], file: HubFile) -> Iterator[bytes]:
    """The pieces, whose git id must be the listed one in the end. Raises HubAway for too few bytes."""
    hasher, size = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False), 0
    for piece in pieces:
        hasher.update(piece)
        size += len(piece)
        yield piece
    if size < file.size:
        raise HubAway(f"{size} of {file.size} bytes of {file.name}")
    if hasher.hexdigest() != file.blob:
        raise mismatch(f"{file.name} with the git id {hasher.hexdigest()} instead of {file.blob}")


def _whole(
    connection: HubConnection,
    store: BlobStore,
    reference: HubReference,
    file: dict[str, Any],
    patience: Patience,
    on_bytes: Callable[[int], None] = lambda now: None,
) -> str:
    """Fetch a file whose SHA-256 is known from where it broke off, unless the store has it, and give the
    digest.
    """
    sha256, size, name = str(file["sha256"]), int(file["size"]), str(file["path"])
    arriving = store.partial(partial_id(reference), sha256)

    def once() -> None:
        if store.has(sha256):  # another job may have brought it meanwhile
            return
        while arriving.offset < size:
            patience.require_time()
            append(arriving.offset)
        arriving.commit(size)

    def append(offset: int) -> None:
        with connection.get(reference.file_path(name), offset) as answer:
            if answer.whole and offset:
                arriving.discard()
                offset = 0
            _require_answer(answer, reference, name, size - offset)
            with arriving.append(offset, size) as writer:
                for piece in answer.pieces():
                    writer.write(piece)
                    patience.require_time()
                    on_bytes(writer.offset)
        if arriving.offset < size:
            raise HubAway(f"{arriving.offset} of {size} bytes of {name}")

    with _stored():
        _while_busy(lambda: patience.persist(once, lambda: arriving.offset), patience)
    return sha256


def _while_busy(action: Callable[[], None], patience: Patience) -> None:
    """Another job may fetch the same file: wait until it is done with it."""
    while True:
        try:
            action()
        except (PartialBusy, WrongOffset):
            patience.require_time()
            patience.wait(BUSY_SECONDS)
        else:
            return


def _require_answer(answer: Answer, reference: HubReference, name: str, size: int) -> None:
    """Raise before a byte is read where the answer says itself that it is another one."""
    if answer.commit not in (None, reference.commit):
        raise mismatch(f"{name} of commit {str(answer.commit)[:80]!r}")
    if answer.length not in (None, size):
        raise mismatch(f"{answer.length} bytes of {name} instead of {size}")


@contextmanager
def _stored() -> Iterator[None]:
    """What the store refuses, as problems."""
    try:
        yield
    except DigestMismatch as error:
        raise mismatch(f"a file with the SHA-256 {error.got} instead of {error.expected}") from None
    except BlobTooLarge as error:
        raise mismatch(f"more than the {error.limit} bytes of a file") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InsufficientStorage(
            "disk-full",
            "The server must have room for the model. Got a full disk. Send the same request again later: it "
            "goes on from the bytes that arrived.",
        ) from None
