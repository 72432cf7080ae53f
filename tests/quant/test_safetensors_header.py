import json

import pytest
import torch
from safetensors.torch import save_file

from quant.safetensors_header import HeaderError, read_header


def write(path, header, body=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {name: (item.dtype, item.shape) for name, item in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
    }
    a = header.tensors["a"]
    assert content[a.start : a.start + a.nbytes] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (entry(), {"length": 1 << 60}, "longer than the file"),
        (b"{", {}, "must be valid safetensors"),
        (b"\xff\xff", {}, "must be valid safetensors"),
        ([], {}, "must be an object"),
        (entry(data_offsets=[0, 17]), {}, "two offsets inside the file"),
        (entry(data_offsets=[8, 0]), {}, "two offsets inside the file"),
        (entry(data_offsets=[0]), {}, "two offsets inside the file"),
        (entry(data_offsets=[0, 8]), {}, "the 16 bytes of its shape"),
        (entry(shape=[-2, -2]), {}, "an integer of at least 0"),
        (entry(shape=[1 << 62, 1 << 62]), {}, "bytes of its shape"),
        (entry(dtype=7), {}, "must be a text"),
        (entry(extra=1), {}, "unknown field"),
        ({"__metadata__": {"a": 1}}, {}, "must be a text"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, options, message):
    with pytest.raises(HeaderError, match=message):
        read_header(write(tmp_path / "x.safetensors", header, **options))


def test_short_files_and_pickles_are_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    torch.save({"a": torch.ones(3)}, tmp_path / "pickle")
    for name in ("short", "pickle"):
        with pytest.raises(HeaderError, match="pickles are never read"):
            read_header(tmp_path / name)
