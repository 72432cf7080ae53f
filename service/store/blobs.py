"""The content-addressed store of one tenant: a folder of read-only files named by their SHA-256 digest."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from service.store import views
from service.store.arrays import read_array, read_arrays, write_arrays
from service.store.durable import publish, sync_file, temporary_file, touch
from service.store.errors import BlobMissing, BlobTooLarge, DigestMismatch, StoreError
from service.store.lock import alone, shared
from service.store.partials import PartialUpload

CHUNK_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
REMOVAL_PATIENCE_SECONDS = 0.5


class BlobStore:
    """Blobs of one tenant under `data_dir`: written once, in constant memory, never half visible.

    ``data_dir/blobs/TENANT/ab/abcd...`` are the blobs, ``partials`` the uploads in progress, ``views`` the
    folders made of blobs, ``tmp`` what a crash may leave behind.

    >>> import tempfile
    >>> store = BlobStore(Path(tempfile.mkdtemp()))
    >>> digest = store.put_bytes(b"abc")
    >>> digest[:8], store.path(digest).read_bytes()
    ('ba7816bf', b'abc')
    """

    def __init__(self, data_dir: Path, tenant: str = "default"):
        if not _TENANT.fullmatch(tenant):
            raise StoreError(f"A tenant must be lowercase letters, digits, - and _. Got {tenant!r}.")
        self.data_dir, self.tenant = Path(data_dir), tenant
        self._temporary = self.data_dir / "tmp"
        self.lock = lock_of(self.data_dir)

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be. Raises StoreError for what is no digest."""
        if not is_digest(digest):
            raise StoreError(f"A digest must be 64 lowercase hexadecimal digits. Got {digest!r}.")
        return self.data_dir / "blobs" / self.tenant / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether the blob is there, whole."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Its bytes. Raises `BlobMissing`."""
        return self._existing(digest).stat().st_size

    def open(self, digest: str) -> BinaryIO:
        """The blob, open for reading. Raises `BlobMissing`."""
        return self._existing(digest).open("rb")

    def put(self, chunks: Iterable[bytes], expected: str | None = None, limit: int | None = None) -> str:
        """Store a stream and give its digest.

        Raises `DigestMismatch` when the digest is not `expected`, and `BlobTooLarge` beyond `limit` bytes.
        """
        hasher, size = hashlib.sha256(), 0
        with temporary_file(self._temporary) as (path, file):
            for chunk in chunks:
                size += len(chunk)
                if limit is not None and size > limit:
                    raise BlobTooLarge(limit)
                hasher.update(chunk)
                file.write(chunk)
            sync_file(file)
            digest = hasher.hexdigest()
            if expected not in (None, digest):
                raise DigestMismatch(str(expected), digest)
            self._publish(path, digest)
        return digest

    def put_bytes(self, content: bytes) -> str:
        """Store a small content and give its digest."""
        return self.put([content])

    def put_file(self, source: Path) -> str:
        """Store a copy of a file and give its digest."""
        with source.open("rb") as file:
            return self.put(iter(lambda: file.read(CHUNK_BYTES), b""))

    def adopt(self, path: Path, pause: Callable[[], None] = lambda: None) -> str:
        """Move a file of ours into the store and give its digest; no second copy is made.

        `pause` is called while the file is read, and may raise. Raises StoreError for what is no plain file.
        """
        if path.is_symlink() or not path.is_file():
            raise StoreError(f"A blob must be made of a plain file. Got {str(path)!r}.")
        hasher = hashlib.sha256()
        with path.open("r+b") as file:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
                pause()
            sync_file(file)
        digest = hasher.hexdigest()
        self._publish(path, digest)
        return digest

    def remove(self, digest: str) -> None:
        """Forget a blob, if it is there; while a backup copies the store, the collection does so later."""
        with alone(self.lock, REMOVAL_PATIENCE_SECONDS) as mine:
            if mine:
                self.path(digest).unlink(missing_ok=True)

    def put_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> str:
        """Store named arrays; equal arrays give the same digest."""
        with temporary_file(self._temporary) as (path, file):
            write_arrays(file, arrays)
            sync_file(file)
            digest = digest_of(path)
            self._publish(path, digest)
        return digest

    def get_arrays(self, digest: str) -> dict[str, NDArray[Any]]:
        """The arrays of `put_arrays`. Raises `BlobMissing`; never unpickles."""
        with self.open(digest) as file:
            return read_arrays(file)

    def get_array(self, digest: str, name: str) -> NDArray[Any] | None:
        """One array of `put_arrays`, the others unread; None where there is none of that name."""
        with self.open(digest) as file:
            return read_array(file, name)

    def partial(self, upload_id: str, digest: str) -> PartialUpload:
        """The upload in progress of one blob; `commit` it to make the blob visible."""
        return PartialUpload(self._partials(upload_id) / digest, self.path(digest), digest, self.lock)

    def drop_partials(self, upload_id: str) -> None:
        """Forget what has arrived of an upload's blobs that are not whole."""
        shutil.rmtree(self._partials(upload_id), ignore_errors=True)

    def materialize(self, manifest: Iterable[tuple[str, str]], digest: str) -> Path:
        """A read-only folder of the (path, blob digest) pairs, kept under `digest`, which names this content.

        Files are hard links to the blobs (copies where the file system has none), never symbolic links.
        Raises `BlobMissing` and `UnsafePath`.
        """
        folder = self.view(digest)
        with shared(self.lock):
            if folder.is_dir():
                touch(folder)
                return folder
        entries = [(name, self._existing(blob)) for name, blob in manifest]
        return views.materialize(entries, folder)

    def drop_view(self, digest: str) -> None:
        """Remove a materialized folder; the blobs stay."""
        views.remove(self.view(digest))

    def view(self, digest: str) -> Path:
        """Where `materialize` makes the folder of this content."""
        return self.data_dir / "views" / self.tenant / self.path(digest).name

    def _partials(self, upload_id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_]{1,100}", upload_id):
            raise StoreError(f"An upload id must be letters, digits and _. Got {upload_id!r}.")
        return self.data_dir / "partials" / self.tenant / upload_id

    def _publish(self, path: Path, digest: str) -> None:
        with shared(self.lock):
            publish(path, self.path(digest))

    def _existing(self, digest: str) -> Path:
        path = self.path(digest)
        if not path.is_file():
            raise BlobMissing(f"The blob must be in the store. Got {digest}, which is not. Upload it.")
        return path


def is_digest(text: str) -> bool:
    """Whether this can be the name of a blob."""
    return _DIGEST.fullmatch(text) is not None


def lock_of(data_dir: Path) -> Path:
    """The lock of a store: shared by whoever adds or copies blobs, held alone by whoever removes some."""
    return data_dir / "blobs" / ".lock"


def digest_of(path: Path) -> str:
    """The SHA-256 digest of a file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
