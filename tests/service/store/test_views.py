import os
from pathlib import Path

import pytest

from service.store import views
from service.store.blobs import BlobStore
from service.store.errors import BlobMissing, UnsafePath

VIEW = "1" * 64


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def test_a_view_holds_the_files_under_their_names(store: BlobStore) -> None:
    manifest = [("config.json", store.put_bytes(b"{}")), ("shards/a.safetensors", store.put_bytes(b"abc"))]
    folder = store.materialize(manifest, VIEW)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "shards" / "a.safetensors").read_bytes() == b"abc"
    assert store.materialize(manifest, VIEW) == folder


def test_a_view_is_read_only_and_has_no_symbolic_links(store: BlobStore) -> None:
    folder = store.materialize([("a/b", store.put_bytes(b"abc"))], VIEW)
    for path in [folder, *folder.rglob("*")]:
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o222 == 0


def test_files_are_not_stored_twice(store: BlobStore) -> None:
    digest = store.put_bytes(b"abc")
    folder = store.materialize([("a", digest)], VIEW)
    assert os.path.samefile(folder / "a", store.path(digest))


def test_without_hard_links_files_are_copied(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*paths: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    digest = store.put_bytes(b"abc")
    copy = store.materialize([("a", digest)], VIEW) / "a"
    assert copy.read_bytes() == b"abc"
    assert not os.path.samefile(copy, store.path(digest))
    assert copy.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "C:x", "a\0b", ".", ".."]
)
def test_a_name_that_leads_elsewhere_is_refused(store: BlobStore, name: str) -> None:
    digest = store.put_bytes(b"abc")
    with pytest.raises(UnsafePath, match="plain and relative"):
        store.materialize([("ok", digest), (name, digest)], VIEW)
    assert list((store.data_dir / "views" / "default").iterdir()) == []


def test_a_name_twice_is_refused(store: BlobStore) -> None:
    digest = store.put_bytes(b"abc")
    with pytest.raises(UnsafePath, match="each path once"):
        store.materialize([("a", digest), ("a", digest)], VIEW)


def test_a_missing_blob_makes_no_view(store: BlobStore) -> None:
    with pytest.raises(BlobMissing):
        store.materialize([("a", "0" * 64)], VIEW)


def test_a_view_can_be_dropped_and_made_again(store: BlobStore) -> None:
    digest = store.put_bytes(b"abc")
    folder = store.materialize([("a/b", digest)], VIEW)
    store.drop_view(VIEW)
    assert not folder.exists()
    assert store.has(digest)
    assert (store.materialize([("a/b", digest)], VIEW) / "a" / "b").read_bytes() == b"abc"


def test_two_processes_may_make_the_same_view(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put_bytes(b"abc")
    entries = [("a", store.path(digest))]
    folder = store.data_dir / "views" / "default" / VIEW
    original = views._seal

    def other_is_faster(growing: Path) -> None:
        original(growing)
        monkeypatch.setattr(views, "_seal", original)
        views.materialize(entries, folder)

    monkeypatch.setattr(views, "_seal", other_is_faster)
    views.materialize(entries, folder)
    assert [path.name for path in folder.parent.iterdir()] == [VIEW]
    assert (folder / "a").read_bytes() == b"abc"
