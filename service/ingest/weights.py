"""Which of several safetensors files of a folder are the model: those that an index or one file covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.digest import INDEXES, WEIGHTS
from service.ingest.strict_json import parse_object

LARGEST_INDEX = 100_000_000


@dataclass(frozen=True)
class Chosen:
    """The files that are taken, and other weights of the folder, which are not; both sorted by name."""

    kept: tuple[str, ...]
    left_out: tuple[str, ...]


def choose(names: Sequence[str], read_index: Callable[[str], bytes]) -> Chosen:
    """What of the files of a folder makes one model, as `quant.digest.weight_files` sees it:
    model.safetensors wins, else the shards of the index count. Without either everything is kept, for later
    checks to judge.

    Raises Unprocessable `invalid-shard-index`.

    >>> choose(["model.safetensors", "consolidated.safetensors", "config.json"], lambda name: b"")
    Chosen(kept=('config.json', 'model.safetensors'), left_out=('consolidated.safetensors',))
    """
    single = next((name for name in WEIGHTS if name in names), None)
    index = next((name for name in INDEXES if name in names), None)
    if single is not None:
        wanted = {single}
    elif index is not None:
        wanted = {index, *_shards(read_index(index), index)}
    else:
        wanted = set(names)
    if not any(name.endswith(".safetensors") and name in names for name in wanted):
        wanted = set(names)
    weights = {name for name in names if name.endswith(".safetensors") or name in INDEXES}
    return Chosen(
        tuple(sorted(name for name in names if name not in weights or name in wanted)),
        tuple(sorted(name for name in weights if name not in wanted)),
    )


def _shards(data: bytes, name: str) -> set[str]:
    index = parse_object(data, what=name, slug="invalid-shard-index", largest=LARGEST_INDEX)
    found = index.get("weight_map")
    return {shard for shard in found.values() if isinstance(shard, str)} if isinstance(found, dict) else set()
