"""Parquet files of strangers: texts come out as JSON lines, from a process that can do nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import Unavailable, Unprocessable
from service.executors.confine import Isolation
from service.ingest import parquet_reader, parquet_text
from service.ingest.parquet_text import jsonl_of

pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """written(column=values): a Parquet file."""
    from pyarrow import parquet

    def write(**columns: Any) -> Path:
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.table(columns), path, compression="zstd")
        return path

    return write


def lines(path: Path, isolation: Isolation | None = None) -> list[Any]:
    content = b"".join(jsonl_of(path, path.name, isolation or Isolation()))
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def refusal(path: Path) -> str:
    with pytest.raises(Unprocessable) as caught:
        lines(path)
    assert caught.value.slug == "invalid-calibration"
    return caught.value.detail


def test_texts_and_contexts(written: Written) -> None:
    path = written(
        text=["some words", "d\u00e9j\u00e0\u2028vu", ""], context=["a", None, "b"], other=[1, 2, 3]
    )
    assert lines(path) == [
        {"text": "some words", "context": "a"},
        {"text": "d\u00e9j\u00e0\u2028vu"},
        {"text": "", "context": "b"},
    ]


def test_messages(written: Written) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert lines(written(messages=[said, said[:1]])) == [{"messages": said}, {"messages": said[:1]}]


@pytest.mark.parametrize("columns", [{"words": ["a"]}, {"text": ["a"], "messages": [[{"role": "user"}]]}])
def test_other_columns_are_refused(written: Written, columns: dict[str, Any]) -> None:
    assert "must have a column text, or one messages" in refusal(written(**columns))


@pytest.mark.parametrize("content", [b"", b"PAR1" + b"\xff" * 64 + b"PAR1", b"not parquet at all"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert "rows.parquet must be a Parquet file of texts" in refusal(path)


def test_a_file_cut_off_is_refused(written: Written) -> None:
    path = written(text=["some words"] * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    assert "must be a Parquet file of texts" in refusal(path)


def test_few_bytes_that_become_many_are_refused(written: Written) -> None:
    """A kilobyte that says a million characters a thousand times."""
    column = pyarrow.array(["x" * 1_000_000] * 1000).dictionary_encode()
    path = written(text=column)
    assert path.stat().st_size < 10_000
    assert f"at most {parquet_text.LEAST_ROOM} bytes of text" in refusal(path)


def test_few_bytes_that_become_many_rows_are_refused(written: Written) -> None:
    path = written(text=pyarrow.array([""] * (parquet_reader.MOST_ROWS + 64)))
    assert path.stat().st_size < 10_000
    assert f"at most {parquet_reader.MOST_ROWS} rows" in refusal(path)


def test_a_reader_that_needs_too_much_memory_is_ended(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_text, "MEMORY_BYTES", 200 * 2**20)
    assert "must be a Parquet file" in refusal(written(text=["x" * 150_000_000]))


def test_a_reader_that_takes_too_long_is_ended(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_text, "CPU_SECONDS", 0)
    assert "read within 0 s" in refusal(written(text=["some words"] * 900_000))


def test_a_large_file_is_not_read(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_text, "LARGEST_FILE", 100)
    assert "must have at most 100 bytes" in refusal(written(text=["some words"]))


def test_the_reader_can_read_nothing_else(written: Written, tmp_path: Path) -> None:
    """The process is confined before the file is opened: places that are closed to it are."""
    from service.executors import confine

    if confine.landlock.abi() < 1:
        pytest.skip("this kernel has no Landlock")
    found = Isolation(mode="require", closed=(str(Path(pyarrow.__file__).parent.resolve()),))
    with pytest.raises(Unprocessable, match="ended with 1"):
        lines(written(text=["some words"]), found)


def test_a_reader_that_cannot_be_confined_is_the_servers_trouble(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unconfined.py").write_text(
        "from service.executors.confine import Isolation\n"
        "from service.ingest import parquet_reader\n"
        "parquet_reader.confine = lambda isolation: ('network not isolated: forbidden',)\n"
        "parquet_reader.main(Isolation('require'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(parquet_text, "READER", "unconfined")
    with pytest.raises(Unavailable, match="network not isolated: forbidden.*bitplan doctor") as caught:
        lines(written(text=["some words"]), Isolation("require"))
    assert (caught.value.status, caught.value.slug) == (503, "not-isolated")


def test_few_files_are_read_at_a_time(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a turn takes a thread that could answer others."""
    monkeypatch.setattr(parquet_text, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(parquet_text, "_turns", threading.BoundedSemaphore(1))
    path = written(text=["some words"])
    first = jsonl_of(path, path.name, Isolation())
    assert next(first)
    with pytest.raises(Unavailable, match="few Parquet files at a time") as caught:
        lines(path)
    assert (caught.value.slug, caught.value.status) == ("too-many-readers", 503)
    assert list(first) == []
    assert lines(path) == [{"text": "some words"}]


def test_without_the_library_it_says_what_to_do(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(text=["some words"])
    monkeypatch.setattr(parquet_text, "find_spec", lambda name: None)
    with pytest.raises(Unprocessable, match=r"bitplan\[parquet\]"):
        lines(path)
