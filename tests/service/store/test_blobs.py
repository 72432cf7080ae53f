import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.store.blobs import BlobStore
from service.store.errors import BlobMissing, BlobTooLarge, DigestMismatch, StoreError


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_blob_is_named_by_its_digest(store: BlobStore) -> None:
    digest = store.put([b"ab", b"c"])
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert store.has(digest)
    assert store.size(digest) == 3
    with store.open(digest) as file:
        assert file.read() == b"abc"


def test_the_same_content_is_kept_once(store: BlobStore, tmp_path: Path) -> None:
    assert store.put_bytes(b"abc") == store.put_bytes(b"abc")
    assert len(files(tmp_path)) == 1


def test_a_wrong_digest_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match="Send it again"):
        store.put([b"abc"], expected="0" * 64)
    assert files(tmp_path) == []


def test_too_many_bytes_leave_nothing(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(BlobTooLarge, match="at most 4 bytes"):
        store.put([b"abc", b"de"], limit=4)
    assert files(tmp_path) == []


def test_a_broken_stream_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store.put(broken())
    assert files(tmp_path) == []


def test_a_large_stream_takes_constant_memory(store: BlobStore) -> None:
    chunk = bytes(2**20)
    tracemalloc.start()
    digest = store.put(chunk for _ in range(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.size(digest) == 64 * 2**20
    assert peak < 8 * 2**20


def test_blobs_are_read_only(store: BlobStore) -> None:
    assert store.path(store.put_bytes(b"abc")).stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("digest", ["", "..", "ABC", "0" * 63, "../" + "0" * 61, "G" * 64])
def test_a_digest_is_no_path(store: BlobStore, digest: str) -> None:
    with pytest.raises(StoreError, match="64 lowercase hexadecimal digits"):
        store.has(digest)


def test_a_missing_blob_is_named(store: BlobStore) -> None:
    with pytest.raises(BlobMissing, match="Upload it"):
        store.open("0" * 64)


def test_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    digest = BlobStore(tmp_path, "one").put_bytes(b"abc")
    assert not BlobStore(tmp_path, "two").has(digest)
    with pytest.raises(StoreError, match="A tenant must be"):
        BlobStore(tmp_path, "../one")


def test_arrays_come_back_and_have_stable_bytes(store: BlobStore) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(1.5),
        "empty": np.zeros((0, 4)),
    }
    digest = store.put_arrays(arrays)
    assert store.put_arrays(dict(reversed(arrays.items()))) == digest
    found = store.get_arrays(digest)
    assert sorted(found) == ["a", "b", "empty"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert not found[name].flags.writeable


def test_object_arrays_are_refused(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        store.put_arrays({"a": np.array([{}], dtype=object)})
    assert files(tmp_path) == []


def test_a_pickle_is_never_loaded(store: BlobStore, tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", a=np.array([{"x": 1}], dtype=object))
    digest = store.put_file(tmp_path / "evil.npz")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        store.get_arrays(digest)
