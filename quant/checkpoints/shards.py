"""Safetensors files laid out from a source's headers, each planned tensor replaced by what stores it.

A folder keeps the shards of its source. Header and offsets are known before any tensor is read; writing then
fills the places one tensor at a time, and copies all others byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quant.checkpoints.protocol import Layout, OutputFile, Wrote
from quant.checkpoints.source import Source, StoredTensor
from quant.digest import CHUNK, CONFIG, INDEXES
from quant.safetensors_header import DTYPE_BYTES, LENGTH_BYTES, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 8
"""Bytes that a header's length is padded to, so that tensors begin where their types need it."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a file: safetensors type name and shape; `copied` is the source's that fills it,
    `content` its bytes where they are known from the start.
    """

    dtype: str
    shape: tuple[int, ...]
    copied: TensorEntry | None = None
    content: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype] if self.copied is None else self.copied.nbytes


Slots = Mapping[str, Slot]
"""Tensor name -> slot."""
Stored = Callable[[StoredTensor], Slots | None]
"""The slots that take the place of a planned tensor, none where another's hold it too; None keeps it."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, metadata and slots."""

    name: str
    metadata: Mapping[str, str]
    slots: Slots

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Tensor name -> first byte after the header; widest types first, then by name."""
        names = sorted(self.slots, key=lambda name: (-DTYPE_BYTES.get(self.slots[name].dtype, 1), name))
        starts, position = {}, 0
        for name in names:
            starts[name] = position
            position += self.slots[name].nbytes
        return starts

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, padded with spaces."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        for name, start in self.offsets.items():
            slot = self.slots[name]
            ends = [start, start + slot.nbytes]
            entries[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": ends}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for slot in self.slots.values())

    @property
    def file(self) -> OutputFile:
        """Name and size."""
        return OutputFile(self.name, len(self.header) + self.payload_bytes, self.payload_bytes)


@dataclass(frozen=True)
class Repacked:
    """A source's folder with other tensors in its weight files and another `config.json`."""

    source: Source
    shards: tuple[Shard, ...]
    replaced: Mapping[StoredTensor, Slots | None]
    config: bytes

    @cached_property
    def written(self) -> dict[str, bytes]:
        """Small files that differ from the source's: name -> content."""
        named = {entry["path"] for entry in self.source.manifest}
        return {CONFIG: self.config, **{name: self._index() for name in INDEXES if name in named}}

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Files that are the source's own: those of tokenizer and processor."""
        other = {*self.source.headers, *self.written}
        return tuple(entry["path"] for entry in self.source.manifest if entry["path"] not in other)

    @property
    def layout(self) -> Layout:
        """Every file with its size; a replaced layer counts with its slots, others with their own bytes."""
        sizes = {entry["path"]: entry["size"] for entry in self.source.manifest}
        files = [shard.file for shard in self.shards]
        files += [OutputFile(name, len(content)) for name, content in self.written.items()]
        files += [OutputFile(name, sizes[name]) for name in self.kept]
        planned = sum(
            item.entry.nbytes if slots is None else sum(slot.nbytes for slot in slots.values())
            for item, slots in self.replaced.items()
        )
        return Layout(tuple(sorted(files, key=lambda file: file.name)), planned)

    def _index(self) -> bytes:
        places = {name: shard.name for shard in self.shards for name in shard.slots}
        total = sum(shard.payload_bytes for shard in self.shards)
        value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

    def write(
        self, out: Path, encode: Callable[[StoredTensor, Tensor], Mapping[str, Tensor]], wrote: Wrote
    ) -> None:
        """Fill the folder. `encode` gives the tensors of the slots of one planned tensor."""
        from quant.checkpoints.tensors import each_stored

        for name, content in self.written.items():
            (out / name).write_bytes(content)
        for name in self.kept:
            shutil.copyfile(self.source.folder / name, out / name)
        for shard in self.shards:
            mine = {item: slots for item, slots in self.replaced.items() if item.file == shard.name}
            with (out / shard.name).open("wb") as stream:
                self._copy(shard, stream)
                changed = (item for item, slots in mine.items() if slots)
                for item, tensor in each_stored(self.source, changed):
                    _fill(shard, stream, encode(item, tensor))
            for item in mine:
                wrote(item.layer)

    def _copy(self, shard: Shard, stream: BinaryIO) -> None:
        """Write the header and every tensor that needs no quantizing."""
        stream.truncate(shard.file.bytes)
        stream.write(shard.header)
        with (self.source.folder / shard.name).open("rb") as source:
            for name, slot in shard.slots.items():
                if slot.content is not None:
                    stream.seek(len(shard.header) + shard.offsets[name])
                    stream.write(slot.content)
                if slot.copied is not None:
                    stream.seek(len(shard.header) + shard.offsets[name])
                    source.seek(slot.copied.start)
                    for piece in _pieces(source, slot.copied.nbytes):
                        stream.write(piece)


def repack(
    source: Source, stored: tuple[StoredTensor, ...], slots: Stored, config: bytes, added: Slots | None = None
) -> Repacked:
    """The folder in which `slots` of each planned tensor take its place; `added` stand in the first file."""
    replaced = {item: slots(item) for item in stored}
    by_name = {(item.file, item.tensor): new for item, new in replaced.items() if new is not None}
    shards: list[Shard] = []
    for file, header in source.headers.items():
        placed: dict[str, Slot] = {} if shards else dict(added or {})
        for name, entry in header.tensors.items():
            placed |= by_name.get((file, name), {name: Slot(entry.dtype, entry.shape, entry)})
        shards.append(Shard(file, header.metadata, placed))
    return Repacked(source, tuple(shards), replaced, config)


def _fill(shard: Shard, stream: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    from quant.checkpoints.tensors import tensor_bytes

    for name, tensor in tensors.items():
        content = tensor_bytes(tensor)
        if len(content) != shard.slots[name].nbytes:
            raise RuntimeError(f"Tensor {name} must fill {shard.slots[name]}. Got {len(content)} bytes.")
        stream.seek(len(shard.header) + shard.offsets[name])
        stream.write(content)


def _pieces(stream: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        piece = stream.read(min(CHUNK, count))
        if not piece:
            raise OSError("file ended early")
        count -= len(piece)
        yield piece
