"""The index of a sharded checkpoint may only name files of its own manifest, and tensors that are in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from service.errors import Unprocessable
from service.ingest.safetensors_header import TensorEntry
from service.ingest.strict_json import parse_object


def check_index(data: bytes, name: str, shards: Mapping[str, tuple[TensorEntry, ...]]) -> None:
    """Raise Unprocessable unless the index `name` maps every tensor of the shards to the shard that holds
    it.
    """
    index = parse_object(data, what=name, slug="invalid-shard-index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _fail(name, "no weight_map of tensor name to file name", "invalid-shard-index")
    for tensor, shard in weight_map.items():
        if shard not in shards:
            _fail(name, f"{str(shard)[:120]!r} for tensor {tensor[:120]!r}", "shard-not-in-manifest")
    held = {entry.name: shard for shard, entries in shards.items() for entry in entries}
    for tensor, shard in weight_map.items():
        if held.get(tensor) != shard:
            _fail(name, f"tensor {tensor[:120]!r}, which {shard} does not hold", "invalid-shard-index")
    for tensor, shard in held.items():
        if tensor not in weight_map:
            _fail(name, f"tensor {tensor[:120]!r} of {shard} left out", "invalid-shard-index")


def _fail(name: str, reason: str, slug: str) -> NoReturn:
    raise Unprocessable(
        slug,
        f"{name} must name every tensor with the safetensors file of the same manifest that holds it. Got "
        f"{reason}. "
        "Send the folder as model.save_pretrained(folder) writes it, with every shard.",
    )
