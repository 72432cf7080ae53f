import hashlib
from pathlib import Path

import pytest

from service.store.blobs import BlobStore
from service.store.errors import BlobTooLarge, DigestMismatch, PartialBusy, StoreError, WrongOffset
from service.store.partials import PartialUpload

CONTENT = b"0123456789"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def partial(store: BlobStore) -> PartialUpload:
    return store.partial("upload_1", DIGEST)


def send(partial: PartialUpload, offset: int, *chunks: bytes) -> None:
    with partial.append(offset, len(CONTENT)) as writer:
        for chunk in chunks:
            writer.write(chunk)


def send_and_break(partial: PartialUpload) -> None:
    with partial.append(0, len(CONTENT)) as writer:
        writer.write(CONTENT[:3])
        raise ConnectionResetError


def test_pieces_become_a_blob_only_at_the_end(store: BlobStore, partial: PartialUpload) -> None:
    assert partial.offset == 0
    send(partial, 0, CONTENT[:4])
    assert partial.offset == 4
    assert not store.has(DIGEST)
    send(partial, 4, CONTENT[4:])
    partial.commit(len(CONTENT))
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert partial.offset == 0


def test_another_process_goes_on_where_it_stopped(tmp_path: Path, partial: PartialUpload) -> None:
    with pytest.raises(ConnectionResetError):
        send_and_break(partial)
    again = BlobStore(tmp_path).partial("upload_1", DIGEST)
    assert again.offset == 3
    send(again, 3, CONTENT[3:])
    assert again.commit(len(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize("offset", [0, 3, 5, 100])
def test_a_wrong_offset_names_the_right_one(partial: PartialUpload, offset: int) -> None:
    send(partial, 0, CONTENT[:4])
    with pytest.raises(WrongOffset, match="Send the rest from 4") as caught:
        send(partial, offset, b"x")
    assert caught.value.expected == 4
    assert partial.offset == 4


def test_more_than_announced_is_dropped(partial: PartialUpload) -> None:
    send(partial, 0, CONTENT[:4])
    with pytest.raises(BlobTooLarge):
        send(partial, 4, b"xx", b"too long a piece")
    assert partial.offset == 4


def test_missing_bytes_are_noticed(partial: PartialUpload) -> None:
    send(partial, 0, CONTENT[:4])
    with pytest.raises(WrongOffset):
        partial.commit(len(CONTENT))
    assert partial.offset == 4


def test_other_bytes_are_dropped_and_may_be_sent_again(store: BlobStore, partial: PartialUpload) -> None:
    send(partial, 0, b"x" * len(CONTENT))
    with pytest.raises(DigestMismatch):
        partial.commit(len(CONTENT))
    assert not store.has(DIGEST)
    assert partial.offset == 0
    send(partial, 0, CONTENT)
    partial.commit(len(CONTENT))
    assert store.has(DIGEST)


def test_one_request_writes_at_a_time(partial: PartialUpload) -> None:
    with partial.append(0, len(CONTENT)) as writer:
        writer.write(CONTENT[:2])
        with pytest.raises(PartialBusy), partial.append(2, len(CONTENT)):
            pass
    assert partial.offset == 2


def test_uploads_of_the_same_blob_do_not_meet(store: BlobStore, partial: PartialUpload) -> None:
    send(partial, 0, CONTENT)
    other = store.partial("upload_2", DIGEST)
    assert other.offset == 0
    send(other, 0, CONTENT)
    partial.commit(len(CONTENT))
    other.commit(len(CONTENT))
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_discard_forgets(partial: PartialUpload) -> None:
    send(partial, 0, CONTENT[:4])
    partial.discard()
    assert partial.offset == 0


def test_an_empty_blob(store: BlobStore) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    store.partial("upload_1", digest).commit(0)
    assert store.size(digest) == 0


def test_an_upload_id_is_no_path(store: BlobStore) -> None:
    with pytest.raises(StoreError, match="An upload id must be"):
        store.partial("../x", DIGEST)
