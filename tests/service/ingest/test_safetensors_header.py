from __future__ import annotations

import io
import pickle

import pytest

from service.errors import Unprocessable
from service.ingest.safetensors_header import DTYPE_BITS, read_header


def read(data: bytes):
    return read_header(io.BytesIO(data), len(data), name="model.safetensors")


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_a_sound_header_gives_its_tensors(make_safetensors, make_floats):
    entries = read(make_safetensors({"a": make_floats(2, 3), "b": make_floats(0), "c": make_floats()}))
    assert [(tensor.name, tensor.shape, tensor.bytes) for tensor in entries] == [
        ("a", (2, 3), 24),
        ("b", (0,), 0),
        ("c", (), 4),
    ]


def test_the_real_library_agrees(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    import numpy as np

    path = tmp_path / "real.safetensors"
    arrays = {"w": np.ones((3, 5), np.float16), "b": np.zeros(3, np.float32), "n": np.array([1, 2], np.int64)}
    numpy_io.save_file(arrays, path, metadata={"format": "pt"})
    entries = {tensor.name: tensor for tensor in read(path.read_bytes())}
    assert {name: tensor.shape for name, tensor in entries.items()} == {n: a.shape for n, a in arrays.items()}
    assert {tensor.bytes for tensor in entries.values()} == {array.nbytes for array in arrays.values()}


@pytest.mark.parametrize(
    ("header", "payload", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlapping tensor 'b'"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "a gap before tensor 'b'"),
        ({"a": entry(4, 8)}, 8, "a gap before tensor 'a'"),
        ({"a": entry(0, 8)}, 4, "end at byte 8 of 4"),
        ({"a": entry(0, 8)}, 12, "end at byte 8 of 12"),
        ({"a": entry(0, 8, [3])}, 8, "12 bytes"),
        ({"a": entry(0, 8, [2**40, 2**40])}, 8, "bytes"),
        ({"a": entry(0, 8, [2**63])}, 8, "of shape"),
        ({"a": entry(0, 8, [-2])}, 8, "of shape"),
        ({"a": entry(0, 8, [True, 2])}, 8, "of shape"),
        ({"a": entry(0, 8, [2.0])}, 8, "of shape"),
        ({"a": entry(0, 8, [1] * 17)}, 8, "of shape"),
        ({"a": entry(0, 8, dtype="Q4")}, 8, "unknown dtype 'Q4'"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "without exactly"),
        ({"a": entry(0, 8) | {"extra": 1}}, 8, "without exactly"),
        ({"a": entry(8, 0, [2])}, 8, "-8 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "data_offsets"),
        ([], 0, "list"),
        (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": {}}', 0, "twice"),
        (b'{"a": ', 0, "syntax error"),
        (b"\xff\xfe", 0, "invalid byte"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(make_file, header, payload, reason):
    with pytest.raises(Unprocessable) as caught:
        read(make_file(header, b"\0" * payload))
    assert caught.value.slug == "invalid-safetensors"
    assert reason in caught.value.detail
    assert "model.safetensors" in caught.value.detail


def test_a_pickle_under_another_name_is_called_one():
    with pytest.raises(Unprocessable, match=r"a pickle renamed to .safetensors"):
        read(pickle.dumps({"a": 1}, protocol=2) + b" " * 20)


def test_a_torch_archive_under_another_name_is_called_one():
    with pytest.raises(Unprocessable, match=r"zip file, such as torch.save writes"):
        read(b"PK\x03\x04" + b"\0" * 100)


@pytest.mark.parametrize("data", [b"", b"\1\0\0", (2**40).to_bytes(8, "little") + b"{}", b"\xff" * 16])
def test_a_length_beyond_the_file_is_refused_before_it_is_read(data):
    with pytest.raises(Unprocessable, match=r"must be a safetensors file"):
        read(data)


def test_sub_byte_tensors_must_fill_whole_bytes(make_file):
    def tensor(values):
        facts = {"dtype": "F4", "shape": [values], "data_offsets": [0, (values + 1) // 2]}
        return make_file({"a": facts}, b"\0" * ((values + 1) // 2))

    assert read(tensor(4))[0].bytes == 2
    with pytest.raises(Unprocessable):
        read(tensor(3))


def test_every_dtype_of_the_format_is_known():
    assert {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"} <= set(DTYPE_BITS)
