from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from service.errors import ServiceError

Tensor = tuple[str, list[int], bytes]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}


def encode(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file of this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return encode(header, b"".join(data for _, _, data in tensors.values()))


def floats(*shape: int) -> Tensor:
    return "F32", list(shape), struct.pack("<f", 0.5) * prod(shape)


@pytest.fixture
def make_file() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def make_safetensors() -> Callable[[Mapping[str, Tensor]], bytes]:
    return safetensors


@pytest.fixture
def make_floats() -> Callable[..., Tensor]:
    return floats


@pytest.fixture
def sound_model() -> dict[str, bytes]:
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors({"a.weight": floats(4, 8), "a.bias": floats(4)}),
    }


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[[Mapping[str, bytes]], dict[str, Path]]:
    def write(files: Mapping[str, bytes]) -> dict[str, Path]:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        return {name: tmp_path / name for name in files}

    return write


@pytest.fixture
def problem_of() -> Callable[..., ServiceError]:
    """The problem that a call raises."""

    def catch(call: Callable[..., Any], *args: Any, **kwargs: Any) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            call(*args, **kwargs)
        return caught.value

    return catch
