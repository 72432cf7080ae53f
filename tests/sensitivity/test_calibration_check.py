from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sensitivity.calibration_check import check_calibration, detect_kind
from sensitivity.errors import BadCalibration
from sensitivity.text_rows import iterate_rows


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(**tensors: np.ndarray) -> Path:
        save_file(tensors, tmp_path / "data.safetensors")
        return tmp_path / "data.safetensors"

    return write


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_facts_of_a_sound_file(save: Callable[..., Path]) -> None:
    path = save(x=np.zeros((9, 2), np.float32), labels=np.zeros(9, np.int64))
    assert check_calibration(path, "safetensors") == {
        "kind": "safetensors",
        "rows": 9,
        "tensors": {
            "x": {"dtype": "F32", "shape": [9, 2]},
            "labels": {"dtype": "I64", "shape": [9]},
        },
        "has_labels": True,
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_tensor_and_row(
    save: Callable[..., Path], dtype: type, bad: float
) -> None:
    values = np.full((8, 3), -1.5, dtype)
    values[5, 1] = bad
    with pytest.raises(BadCalibration, match=r"tensor 'x' must be finite. Got NaN or infinity in row 5"):
        check_calibration(save(x=values), "safetensors")


def test_bfloat16_is_checked_too(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.ones(8, 3, dtype=torch.bfloat16)
    path = tmp_path / "data.safetensors"
    save_torch({"x": values}, path)
    assert check_calibration(path, "safetensors")["rows"] == 8
    values[7, 2] = torch.inf
    save_torch({"x": values}, path)
    with pytest.raises(BadCalibration, match="row 7"):
        check_calibration(path, "safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x": np.zeros((8, 2)), "y": np.zeros((7, 2))}, "same first dimension. Got 8 in 'x' and 7 in 'y'"),
        ({"x": np.zeros((5, 2))}, "at least 6 samples.*Got 5"),
        ({"x": np.zeros((0, 2))}, "at least 6 samples.*Got 0"),
        ({"x": np.zeros((8, 0))}, "'x' must not be empty"),
        ({"x": np.array(1.0)}, "'x' must have one row per sample. Got a scalar"),
        ({"labels": np.zeros(8, np.int64)}, "must hold the model's inputs. Got only labels"),
        ({}, "at least one tensor"),
    ],
)
def test_unusable_tensors(save: Callable[..., Path], tensors: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(BadCalibration, match=words):
        check_calibration(save(**tensors), "safetensors")


F32 = {"dtype": "F32", "shape": [8, 1]}


TWICE = ", ".join(
    f'"x": {{"dtype": "F32", "shape": [8, 1], "data_offsets": [{a}, {a + 32}]}}' for a in (0, 32)
)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (
            {"x": {**F32, "dtype": "OBJ", "data_offsets": [0, 32]}},
            bytes(32),
            "dtype of tensor 'x' must be one of",
        ),
        ({"x": {**F32, "data_offsets": [0, 31]}}, bytes(31), "must be the 32 bytes of its shape"),
        ({"x": {**F32, "data_offsets": [0, 32]}}, bytes(31), "inside the file"),
        ({"x": {**F32, "data_offsets": [4, 36]}}, bytes(36), "without gap or overlap"),
        (
            {"x": {**F32, "data_offsets": [0, 32]}, "y": {**F32, "data_offsets": [0, 32]}},
            bytes(32),
            "without gap or overlap",
        ),
        ({"x": {**F32, "shape": [2**62, 2**62], "data_offsets": [0, 32]}}, bytes(32), "bytes of its shape"),
        ({"x": {**F32, "shape": [-1], "data_offsets": [0, 32]}}, bytes(32), "integer of at least 0"),
        ({"x": {**F32, "data_offsets": [0]}}, bytes(32), "two offsets"),
        ({"x": {**F32, "data_offsets": [0, 32]}}, bytes(33), "Got 1 bytes after them"),
        ({"x": 3}, b"", "/x must be an object"),
        ([1], b"", "must be an object"),
        (f"{{{TWICE}}}".encode(), bytes(64), "Names must be unique"),
        (b"{not json", b"", "must be valid safetensors"),
        (b"\xff\xfe{}", b"", "must be valid safetensors"),
        (b"[" * 100_000, b"", "must be valid safetensors"),
        (b'{"x": {"dtype": "F32", "shape": [' + b"9" * 6000 + b"]}}", b"", "must be valid safetensors"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    with pytest.raises(BadCalibration, match=words):
        check_calibration(with_header(tmp_path / "x.safetensors", header, data), "safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps([1]), "Got a pickle. Save tensors with safetensors"),
        (b"PK\x03\x04" + bytes(60), "Got a zip archive"),
        (b"\x93NUMPY" + bytes(60), "Got a npy file"),
        (struct.pack("<Q", 2**40) + b"{}", "whose header is longer than the file"),
        (b"", "must be safetensors"),
        (b"abc", "must be safetensors"),
    ],
)
def test_other_formats(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCalibration, match=words):
        check_calibration(path, "safetensors")


def test_text_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one\r\n\n  \nzwölf".encode())
    assert list(iterate_rows(path, "text")) == ["one", "zwölf"]
    assert check_calibration(path, "text")["rows"] == 2


def test_jsonl_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    message = {"role": "user", "content": "hi"}
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"messages": [message | {"n": 1}]}))
    assert list(iterate_rows(path, "jsonl")) == ["one", [message]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "row 2 must be a JSON object"),
        ("[" * 100_000, "row 2 must be a JSON object"),
        ("[1]", 'row 2 must be an object with either "text" or "messages"'),
        ('{"prompt": "x"}', 'row 2 must be an object with either "text" or "messages"'),
        ('{"text": "x", "messages": []}', "row 2 must be an object with either"),
        ('{"text": 3}', '"text" of row 2 must be a string'),
        ('{"text": "  "}', '"text" of row 2 must be a string that is not empty'),
        ('{"text": "\\ud800"}', "row 2 must be Unicode"),
        ('{"messages": []}', '"messages" of row 2 must be a list that is not empty'),
        ('{"messages": [{"role": "user"}]}', 'each message of row 2 must have a "role" and a "content"'),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(BadCalibration, match=words):
        check_calibration(path, "jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least one row"),
        (b" \n\n", "at least one row"),
        (b"ok\n\xff\xfe\n", "row 2 must be UTF-8"),
        (b"ok\na\0b\n", "row 2 must be text. Got a NUL"),
        (b"PK\x03\x04rest", "Got a zip archive"),
        (b"ok\n" + b"x" * (2**24 + 1), "row 2 must be shorter"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(BadCalibration, match=words):
        check_calibration(path, "text")


def test_missing_files_and_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(BadCalibration, match=r"must be a file. Got 'nowhere.txt'"):
        check_calibration(tmp_path / "nowhere.txt", "text")
    (tmp_path / "x.npy").write_bytes(b"PK")
    with pytest.raises(BadCalibration, match=r"in one of .safetensors, .npz, .txt, .jsonl. Got 'x.npy'"):
        detect_kind(tmp_path / "x.npy")
    with pytest.raises(BadCalibration, match="kind must be one of safetensors, npz, text, jsonl"):
        check_calibration(tmp_path / "x.npy", "npy")
