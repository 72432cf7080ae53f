"""The cache of a node: whole or absent, verified, swept by last use, never from under somebody."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from quant.digest import manifest_digest
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from service.executors import node_cache
from service.executors.node_cache import CacheFull, Coming, Kind, NodeCache, NotWhatWasAsked, send
from service.executors.ray_scorer import localized
from service.store.errors import StoreError, UnsafePath


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model_of(**files: bytes) -> tuple[str, dict[str, bytes]]:
    entries = [
        {"path": name, "size": len(content), "sha256": sha(content)} for name, content in files.items()
    ]
    return manifest_digest(entries), files


def fetch(
    cache: NodeCache, digest: str, files: dict[str, bytes], kind: Kind = "model", piece: int = 3
) -> Path:
    arrival = cache.fetch(digest)
    assert arrival is not None
    arrival.expect([Coming(name, len(content)) for name, content in files.items()])
    for content in files.values():
        for start in range(0, len(content), piece):
            arrival.receive(content[start : start + piece])
    try:
        return arrival.finish(kind)
    except NotWhatWasAsked:
        arrival.drop()
        raise


def data(content: bytes) -> tuple[str, dict[str, bytes]]:
    return sha(content), {"data": content}


def test_what_comes_is_whole_read_only_and_found_again(tmp_path: Path) -> None:
    digest, files = model_of(config=b"{}", weights=b"0123456789", empty=b"")
    cache = NodeCache(tmp_path)
    assert not cache.hold(digest)
    folder = fetch(cache, digest, files)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert stat.S_IMODE(folder.stat().st_mode) == 0o555
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o444}
    assert NodeCache(tmp_path).hold(digest)
    assert list((tmp_path / "coming").iterdir()) == []


@pytest.mark.parametrize(
    "sent",
    [
        {"config": b"{}", "weights": b"0123456780"},
        {"config": b"{}", "weights": b"012345678"},
        {"config": b"{}", "weights": b"0123456789", "more": b"x"},
        {"config": b"{}"},
    ],
)
def test_other_bytes_than_the_digest_names_are_never_visible(tmp_path: Path, sent: dict[str, bytes]) -> None:
    digest, files = model_of(config=b"{}", weights=b"0123456789")
    cache = NodeCache(tmp_path)
    with pytest.raises(NotWhatWasAsked, match=f"must have the digest {digest}. Got .*Send it again"):
        fetch(cache, digest, sent)
    assert not cache.hold(digest)
    assert fetch(cache, digest, files).is_dir()


def test_more_bytes_than_were_announced_are_refused(tmp_path: Path) -> None:
    arrival = NodeCache(tmp_path).fetch(sha(b"ab"))
    assert arrival is not None
    arrival.expect([Coming("data", 2)])
    with pytest.raises(NotWhatWasAsked, match="data must have 2 bytes. Got more"):
        arrival.receive(b"abc")


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    arrival = NodeCache(tmp_path).fetch("a" * 64)
    assert arrival is not None
    with pytest.raises(UnsafePath):
        arrival.expect([Coming("../x", 1)])
    with pytest.raises(StoreError, match="must be 64 lowercase"):
        NodeCache(tmp_path).fetch("../" * 10)


def test_one_process_receives_and_the_others_wait(tmp_path: Path) -> None:
    digest, files = data(b"abc")
    first, second = NodeCache(tmp_path), NodeCache(tmp_path)
    arrival = first.fetch(digest)
    assert arrival is not None
    assert not second.hold(digest)
    assert second.fetch(digest) is None
    arrival.drop()
    fetch(second, digest, files, "data")
    assert first.hold(digest)


def test_what_a_dead_process_left_half_is_begun_anew(tmp_path: Path) -> None:
    digest, files = data(b"abcdef")
    (NodeCache(tmp_path).folder / "coming" / digest).mkdir()
    (tmp_path / "coming" / digest / "data").write_bytes(b"abc")
    assert (fetch(NodeCache(tmp_path), digest, files, "data") / "data").read_bytes() == b"abcdef"


def test_what_dead_processes_left_half_goes_first_but_nothing_that_still_comes(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, limit_bytes=30)
    fetch(cache, *data(b"a" * 10), "data")
    cache.release()
    left, coming = tmp_path / "coming" / sha(b"left"), NodeCache(tmp_path).fetch(sha(b"b" * 10))
    left.mkdir()
    (left / "data").write_bytes(b"left" * 3)
    assert coming is not None
    coming.expect([Coming("data", 10)])
    coming.receive(b"b" * 9)
    cache.make_room(11)
    assert not left.exists()
    assert cache.hold(sha(b"a" * 10))
    coming.receive(b"b")
    assert coming.finish("data").is_dir()


def test_what_another_process_sweeps_meanwhile_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path, limit_bytes=30)
    monkeypatch.setattr(cache, "_folders", lambda kind: [tmp_path / kind / sha(b"swept")])
    cache.make_room(30)


def test_what_was_used_least_recently_goes_but_nothing_that_is_held(tmp_path: Path) -> None:
    cache, other = NodeCache(tmp_path, limit_bytes=30), NodeCache(tmp_path, limit_bytes=30)
    old, middle, new = (data(letter * 10) for letter in (b"a", b"b", b"c"))
    for age, (digest, files) in enumerate((old, middle, new)):
        os.utime(fetch(cache, digest, files, "data"), (age, age))
    cache.release()
    assert other.hold(old[0])
    os.utime(other.path(old[0]), (0, 0))
    fetch(cache, *data(b"d" * 10), "data")
    assert [cache.hold(digest) for digest, _ in (old, middle, new)] == [True, False, True]
    cache.release()
    with pytest.raises(CacheFull, match="must have room for 31 bytes.*BITPLAN_RAY_CACHE_LIMIT"):
        cache.make_room(31)
    assert other.path(old[0]).is_dir()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "RESERVE_BYTES", 2**60)
    with pytest.raises(CacheFull, match="free on the disk"):
        NodeCache(tmp_path).make_room(1)


def test_files_are_sent_in_pieces_and_as_many_bytes_as_announced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456")
    (tmp_path / "b").write_bytes(b"")
    got: list[bytes] = []
    files = [(name, tmp_path / name) for name in ("a", "b")]
    send(files, [Coming("a", 5), Coming("b", 0)], got.append, 2)
    assert got == [b"01", b"23", b"4"]
    with pytest.raises(NotWhatWasAsked, match="a must have 9 bytes. Got 2 fewer"):
        send(files, [Coming("a", 9), Coming("b", 0)], got.append, 2)


def test_a_spec_points_to_what_the_node_has_and_to_nothing_else(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    digest, files = model_of(config=b"{}")
    folder = fetch(cache, digest, files)
    text, content = data(b"words")
    fetch(cache, text, content, "data")
    other = SessionSpec(ModelSource("factory", "a:b", ""), DataSource("/x", "text", text))
    spec = SessionSpec(
        ModelSource("folder", "/runner/model", digest), DataSource("/y", "text", "bb"), statistics=other
    )
    found = localized(spec, cache)
    assert found.model == ModelSource("folder", str(folder), digest)
    assert found.calibration == spec.calibration
    assert found.statistics is not None
    assert found.statistics.model == other.model
    assert Path(found.statistics.calibration.path).read_bytes() == b"words"
