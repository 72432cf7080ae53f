"""npz files of strangers: numbers are read, and nothing else is."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from sensitivity import npz
from sensitivity.calibration_check import check_calibration
from sensitivity.errors import BadCalibration


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.npz"


def member(array: Any, *, header: bytes | None = None) -> bytes:
    """The bytes of one .npy; `header` replaces the text that says type and shape."""
    buffer = io.BytesIO()
    npy.write_array(buffer, np.asarray(array), version=(1, 0))
    data = buffer.getvalue()
    if header is None:
        return data
    [length] = struct.unpack("<H", data[8:10])
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(BadCalibration) as caught:
        check_calibration(path, "npz")
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_described_and_read(path: Path, save: Callable[..., None]) -> None:
    arrays = {
        "pixel_values": np.random.default_rng(0).normal(size=(9, 3, 4)).astype(np.float32),
        "half": np.ones((9, 2), ">f2"),
        "mask": np.eye(9, dtype=bool),
        "labels": np.arange(9),
    }
    save(path, **arrays)
    assert check_calibration(path, "npz") == {
        "kind": "npz",
        "rows": 9,
        "tensors": {
            "half": {"dtype": "F16", "shape": [9, 2]},
            "labels": {"dtype": "I64", "shape": [9]},
            "mask": {"dtype": "BOOL", "shape": [9, 9]},
            "pixel_values": {"dtype": "F32", "shape": [9, 3, 4]},
        },
        "has_labels": True,
    }
    read = npz.load_arrays(path)
    for name, array in arrays.items():
        assert np.array_equal(read[name], array)
        assert read[name].dtype == array.dtype.newbyteorder("=")


def test_large_arrays_come_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_CHUNK", 40)
    values = np.arange(300.0).reshape(10, 30)
    np.savez_compressed(path, x=values)
    assert np.array_equal(npz.load_arrays(path)["x"], values)
    values[7, 29] = np.nan
    np.savez(path, x=values)
    assert "NaN or infinity in row 7" in refused(path)


class Spy:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([Spy()] * 8, dtype=object), "Got objects, which are pickles"),
        (np.zeros(8, [("a", "f4"), ("b", "O")]), "Got objects, which are pickles"),
        (np.zeros(8, [("a", "f4"), ("b", "i4")]), "must be one of"),
        (np.array(["text"] * 8), "must be one of"),
        (np.array([b"text"] * 8), "must be one of"),
        (np.zeros(8, np.complex64), "must be one of"),
        (np.zeros(8, np.uint64), "must be one of"),
        (np.zeros(8, "M8[s]"), "must be one of"),
        (np.zeros(8, np.longdouble), "must be one of"),
        (np.zeros((8, 3), order="F"), "Got Fortran order"),
        (np.array(1.0), "must have one row per sample"),
        (np.zeros((5, 2)), "at least 6 samples"),
        (np.zeros((8, 0)), "must not be empty"),
        (np.full(8, np.inf, np.float16), "NaN or infinity in row 0"),
    ],
)
def test_arrays_that_are_no_numbers_are_refused(path: Path, array: Any, words: str) -> None:
    np.savez(path, x=array)
    assert words in refused(path)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "npy format"),
        (b"\x80\x04pickle that is long enough", "npy format"),
        (npy.MAGIC_PREFIX + b"\x09\x00" + bytes(30), "npy format"),
        (npy.MAGIC_PREFIX + b"\x02\x00" + struct.pack("<I", 2**31) + bytes(30), "must be short"),
        (member(np.zeros(8, "f4"), header=HEADER % b"(2**62, 4)"), "npy header"),
        (member(np.zeros(8, "f4"), header=HEADER % b"(4611686018427387904, 4)"), "bytes of its shape"),
        (member(np.zeros(8, "f4"), header=HEADER % b"(-8,)"), "sides of 0 or more"),
        (member(np.zeros(8, "f4"), header=HEADER % b"(True, 8)"), "must have"),
        (member(np.zeros(8, "f4"), header=HEADER % b"(9,)"), "must have the 36 bytes of its shape. Got 32"),
        (member(np.zeros(8, "f4"), header=HEADER % (b"(" + b"1," * 17 + b"8)")), "sides of 0 or more"),
        (member(np.zeros(8, "f4"), header=HEADER % (b"(" * 300 + b")" * 300)), "npy header"),
        (member(np.zeros(8, "f4"), header=b"__import__('os').abort()\n"), "npy header"),
    ],
)
def test_headers_that_lie(path: Path, data: bytes, words: str) -> None:
    assert words in refused(archive(path, {"x.npy": data}))


def test_archives_that_lie(path: Path) -> None:
    good = member(np.zeros((8, 2), "f4"))
    assert "hold arrays alone" in refused(archive(path, {"x.npy": good, "evil.py": b""}))
    assert "hold arrays alone" in refused(archive(path, {".npy": good}))
    assert "at least one array" in refused(archive(path, {}))
    assert "another method" in refused(archive(path, {"x.npy": good}, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x.npy", good)
    assert "must be in the file once" in refused(path)
    whole = archive(path, {"x.npy": good}).read_bytes()
    late = whole[:-6] + struct.pack("<I", len(whole)) + whole[-2:]  # its members begin before the file does
    cut = (whole[:-30], whole[:40], b"", b"PK\x03\x04")
    for broken in (*cut, late, whole.replace(bytes(20), b"\xff" * 20, 1)):
        path.write_bytes(broken)
        assert "npz file" in refused(path)


def test_fewer_bytes_than_declared_are_noticed(path: Path) -> None:
    """The directory is changed to say more, the checksum stays right."""
    header = HEADER % b"(12, 2)"
    text = member(np.zeros((8, 2), "f4"), header=header)
    archive(path, {"x.npy": text}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes().replace(struct.pack("<I", len(text)), struct.pack("<I", len(text) + 32))
    path.write_bytes(data)
    assert "must be whole. Got 64 bytes" in refused(path)


def test_bombs_are_refused_by_what_they_declare(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "LEAST_ROOM", 2**20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as target:
        npy.write_array(target, np.zeros((8, 2**20), "f4"))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    assert "20 times the bytes of their file" in refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21


def test_many_arrays_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MOST_ARRAYS", 2)
    assert "at most 2 arrays. Got 3" in refused(archive(path, {f"x{n}.npy": b"" for n in range(3)}))


def test_a_directory_that_says_it_is_huge_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "LONGEST_READ", 2**17)
    archive(path, {f"{'x' * 200}{n}.npy": b"" for n in range(1000)})
    assert "must have at most 131072 bytes" in refused(path)
