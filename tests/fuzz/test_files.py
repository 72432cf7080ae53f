"""Files of strangers: a parser gives facts or one of the documented problems, never another exception, and what
it gives can be sent as JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sensitivity.calibration_check import check_calibration
from sensitivity.errors import BadCalibration
from service.errors import ServiceError
from service.executors.confine import Isolation
from service.ingest.kinds import calibration_kind, check_model_files
from service.ingest.local_folder import allowed_folder
from service.ingest.model_folder import check_model
from service.ingest.parquet_text import jsonl_of
from service.ingest.paths import check_paths
from service.ingest.strict_json import parse_json
from service.store.blobs import BlobStore
from service.store.errors import BlobTooLarge, DigestMismatch, WrongOffset
from tests.fuzz.effort import Effort
from tests.service.api.conftest import CONFIG, floats, safetensors

ANY_TEXT = st.text(st.characters(codec=None), max_size=8)  # halves of surrogate pairs too
KEYS = ANY_TEXT | st.sampled_from(
    [
        "model_type",
        "auto_map",
        "quantization_config",
        "num_layers",
        "hidden_size",
        "_class_name",
        "architectures",
    ]
)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**300, 2**63 - 1, 2**63, -1])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(0, 7) | NUMBERS, max_size=20)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F4", "F8_E4M3"]) | VALUES,
        "shape": SHAPES | VALUES,
        "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, max_size=3) | VALUES,
    },
    optional={"more": VALUES},
)
HEADERS = st.dictionaries(ANY_TEXT | st.just("__metadata__"), TENSORS | VALUES, max_size=4)
SOUND = {"w": {"dtype": "F32", "shape": [6, 2], "data_offsets": [0, 48]}}


def text_of(value: Any) -> bytes:
    """As JSON, with escapes where UTF-8 has no bytes."""
    return json.dumps(value).encode()


@st.composite
def mutated(draw: Any, documents: st.SearchStrategy[bytes]) -> bytes:
    """A document, as it is or with a few bytes taken out, exchanged or put in."""
    data = bytearray(draw(documents))
    for _ in range(draw(st.integers(0, 2))):
        place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data[place : place + length] = draw(st.binary(max_size=3))
    return bytes(data)


@st.composite
def tensor_files(draw: Any) -> bytes:
    """Safetensors files with odd headers, odd lengths and odd contents."""
    header = draw(mutated(HEADERS.map(text_of) | st.just(text_of(SOUND))))
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    content = draw(st.just(bytes(48)) | st.binary(max_size=64))
    return length.to_bytes(8, "little") + header + content


CONFIGURATIONS = mutated(
    st.dictionaries(KEYS, VALUES, max_size=5).map(lambda members: text_of(CONFIG | members))
    | VALUES.map(text_of)
)
INDEXES = mutated(
    st.dictionaries(
        ANY_TEXT | st.just("w"), ANY_TEXT | st.just("model.safetensors") | VALUES, max_size=3
    ).map(lambda names: text_of({"weight_map": names}))
    | VALUES.map(text_of)
)
ROWS = mutated(
    st.lists(
        st.fixed_dictionaries({}, optional={"text": VALUES, "messages": VALUES, "context": VALUES})
        | st.just({"text": "some words"}),
        max_size=8,
    ).map(lambda rows: b"\n".join(map(text_of, rows)))
)


ARRAYS = st.sampled_from(
    [
        np.zeros((7, 2)),
        np.zeros(6, np.int8),
        np.array([{}] * 6),
        np.array(["a"] * 6),
        np.zeros((6, 0)),
        np.float32(1),
    ]
)


def archive_of(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


ARCHIVES = mutated(
    st.dictionaries(st.sampled_from(["x", "labels", "context", "a/b"]), ARRAYS).map(archive_of)
)


def table_of(texts: list[Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, "context": ["a"] * len(texts)}), buffer)
    return buffer.getvalue()


TABLES = mutated(st.lists(st.just("some words"), max_size=8).map(table_of))


def facts_or(problem: type[Exception], parse: Callable[[], Any]) -> None:
    """Parse; the facts, or the words of the problem, must be something that can be sent."""
    try:
        found = parse()
    except problem as error:
        found = str(error)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """saved(**files): name with __ for the dot -> place, as a manifest has them."""

    def save(**files: bytes) -> dict[str, Path]:
        places = {name.replace("__", "."): tmp_path / name for name in files}
        for place, data in zip(places.values(), files.values(), strict=True):
            place.write_bytes(data)
        return places

    return save


Saved = Callable[..., dict[str, Path]]
WEIGHTS = safetensors({"w": floats(6, 2)})


def test_strict_json(effort: Effort) -> None:
    @given(mutated(VALUES.map(text_of)))
    def run(data: bytes) -> None:
        try:
            found = parse_json(data, what="The file")
        except ServiceError as problem:
            found = problem.as_json()
        else:
            assert found == json.loads(data)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()

    effort.check(run, 100)


def test_configurations(effort: Effort, saved: Saved) -> None:
    @given(CONFIGURATIONS)
    def run(config: bytes) -> None:
        files = saved(config__json=config, model__safetensors=WEIGHTS)
        facts_or(ServiceError, lambda: check_model(files).as_json())

    effort.check(run, 100)


def test_safetensors_headers_of_models(effort: Effort, saved: Saved) -> None:
    @given(tensor_files())
    def run(weights: bytes) -> None:
        files = saved(config__json=text_of(CONFIG), model__safetensors=weights)
        facts_or(ServiceError, lambda: check_model(files).as_json())

    effort.check(run, 100)


def test_shard_indexes(effort: Effort, saved: Saved) -> None:
    @given(INDEXES)
    def run(index: bytes) -> None:
        files = saved(
            config__json=text_of(CONFIG), model__safetensors=WEIGHTS, model__safetensors__index__json=index
        )
        facts_or(ServiceError, lambda: check_model(files).as_json())

    effort.check(run, 60)


@pytest.mark.parametrize(
    ("kind", "files"), [("safetensors", tensor_files()), ("jsonl", ROWS), ("text", ROWS), ("npz", ARCHIVES)]
)
def test_calibration_files(effort: Effort, saved: Saved, kind: str, files: st.SearchStrategy[bytes]) -> None:
    @given(files)
    def run(data: bytes) -> None:
        places = saved(calibration=data)
        facts_or(BadCalibration, lambda: check_calibration(places["calibration"], kind))

    effort.check(run, 60)


def test_parquet_files(effort: Effort, saved: Saved) -> None:
    @given(TABLES)
    def run(data: bytes) -> None:
        places = saved(calibration=data)
        lines = jsonl_of(places["calibration"], "c.parquet", Isolation())
        facts_or(ServiceError, lambda: b"".join(lines).decode())

    effort.check(run, 8)


NAMES = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "config.json",
        "model.safetensors",
        "a.txt",
        "../a.txt",
        "CON.txt",
        "pytorch_model.bin",
        "run.py",
        "a\0.txt",
    ]
)


def test_names_of_manifests(effort: Effort) -> None:
    @given(st.lists(NAMES, max_size=4))
    def run(names: list[str]) -> None:
        for check in (check_paths, check_model_files, calibration_kind):
            facts_or(ServiceError, lambda check=check: check(names))

    effort.check(run, 60)


def test_folders_of_the_server(effort: Effort, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    names = st.text(st.characters(codec="utf-8"), max_size=12) | st.just("a" * 1500)
    inside = st.sampled_from(["", f"{tmp_path}/models/", f"{tmp_path}/models/../"])

    @given(inside, names)
    def run(folder: str, name: str) -> None:
        facts_or(ServiceError, lambda: str(allowed_folder(folder + name, [tmp_path / "models"])))

    effort.check(run, 40)


def test_offsets_of_uploads(effort: Effort, tmp_path: Path) -> None:
    """Pieces at any offset: the blob is seen when the right bytes are complete, and never before."""
    content, digest = b"abcdef", "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"
    pieces = st.tuples(st.integers(0, 7), st.sampled_from([b"", b"abc", b"def", b"abcdef", b"abcdefg", b"x"]))

    @given(st.lists(pieces, max_size=6))
    def run(sent: list[tuple[int, bytes]]) -> None:
        store = BlobStore(tmp_path / "store")
        partial, arrived = store.partial("upload", digest), b""
        partial.discard()
        for offset, piece in sent:
            try:
                with partial.append(offset, len(content)) as writer:
                    writer.write(piece)
            except WrongOffset:
                assert offset != len(arrived)
            except BlobTooLarge:
                assert offset == len(arrived)
                assert len(arrived + piece) > len(content)
            else:
                arrived += piece
            assert partial.offset == len(arrived)
        try:
            place = partial.commit(len(content))
        except WrongOffset:
            assert len(arrived) < len(content)
        except DigestMismatch:
            assert arrived != content
            assert partial.offset == 0
        else:
            assert place.read_bytes() == arrived == content
            place.chmod(0o600)
            place.unlink()
        assert not store.path(digest).exists()

    effort.check(run, 40)
