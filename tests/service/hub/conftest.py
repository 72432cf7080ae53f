from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest

from service.hub.fetching import Patience
from service.hub.place import HubPlace
from service.hub.reference import HubReference
from service.store.blobs import BlobStore
from tests.service.hub_server import COMMIT, REPOSITORY, Hub, hub_serving

WANTED = HubReference(REPOSITORY, COMMIT)


def weights(**shapes: list[int]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + struct.pack("<f", 0.5) * (position // 4)


def model_files() -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"model_type": "llama", "hidden_size": 16}).encode(),
        "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}).encode(),
        "model.safetensors": weights(weight=[64, 64]),
        "pytorch_model.bin": b"\x80\x02never fetched",
        "README.md": b"# A model",
        "modeling_own.py": b"raise SystemExit",
        "onnx/model.onnx": b"not ours",
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_serving(model_files()) as hub:
        yield hub


@pytest.fixture
def place(hub: Hub) -> HubPlace:
    return HubPlace(hub.url)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "data")


@pytest.fixture
def patience() -> Patience:
    return Patience(wait=lambda seconds: None)
