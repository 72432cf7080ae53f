"""Downloads over connections that break, and archives that are not ours."""

import hashlib
import io
import tarfile

import httpx2
import pytest

from service.remote.download import download, unpack
from service.remote.transport import ClientError, ConnectionFailed, ProblemError, Transport

CONTENT = bytes(range(256)) * 40
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


class Breaking(httpx2.SyncByteStream):
    """Gives some bytes, then breaks."""

    def __init__(self, content):
        self.content = content

    def __iter__(self):
        yield self.content
        raise httpx2.ReadError("broken")


@pytest.fixture
def transport():
    """transport(answer): requests are answered by answer(request)."""

    def make(answer):
        http = httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://test")
        return Transport(http, retries=3, pause=lambda _: None)

    return make


def test_a_broken_download_goes_on_where_it_stopped(transport, tmp_path):
    asked = []

    def answer(request):
        asked.append(request.headers.get("Range"))
        start = int((asked[-1] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        assert request.headers.get("If-Range") == (ETAG if start else None)
        status, headers = (206 if start else 200), {"ETag": ETAG}
        if len(asked) < 3:
            return httpx2.Response(status, headers=headers, stream=Breaking(CONTENT[start : start + 1000]))
        return httpx2.Response(status, headers=headers, content=CONTENT[start:])

    download(transport(answer), "/file", {}, tmp_path / "new" / "file")
    assert asked == [None, "bytes=1000-", "bytes=2000-"]
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda _: httpx2.Response(200, headers={"ETag": '"0"'}, content=CONTENT), ClientError, "the digest"),
        (lambda _: httpx2.Response(404, json={"detail": "None here."}), ProblemError, "None here."),
        (lambda _: httpx2.Response(200, stream=Breaking(b"x")), ConnectionFailed, "must be reachable"),
    ],
)
def test_nothing_is_left_of_a_download_that_fails(answer, error, words, transport, tmp_path):
    with pytest.raises(error, match=words):
        download(transport(answer), "/file", {}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(transport, tmp_path):
    answers = iter([httpx2.Response(503), httpx2.Response(200, headers={"ETag": ETAG}, content=CONTENT)])
    download(transport(lambda _: next(answers)), "/file", {}, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def member(name, kind=tarfile.REGTYPE):
    found = tarfile.TarInfo(name)
    found.type, found.size = kind, 1 if kind == tarfile.REGTYPE else 0
    return found


def pack(place, *members):
    with tarfile.open(place, "w") as packed:
        for item in members:
            packed.addfile(item, io.BytesIO(b"x"))
    return place


def test_plain_files_are_unpacked_into_a_new_or_empty_folder(tmp_path):
    archive = pack(tmp_path / "a.tar", member("one"), member("two"))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new"):
        unpack(archive, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"x", "two": b"x"}


@pytest.mark.parametrize(
    "item",
    [
        member("../up"),
        member("/abs"),
        member("a/b"),
        member(".."),
        member("link", tarfile.SYMTYPE),
        member("hard", tarfile.LNKTYPE),
        member("pipe", tarfile.FIFOTYPE),
        member("folder", tarfile.DIRTYPE),
    ],
    ids=lambda item: item.name,
)
def test_anything_else_is_refused_and_leaves_nothing(item, tmp_path):
    archive = pack(tmp_path / "a.tar", member("one"), item)
    with pytest.raises(ClientError, match="must hold plain files only"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
