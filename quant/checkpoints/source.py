"""A model folder as the source of a checkpoint: its files, and which stored tensor is which layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from quant.checkpoints.joined import Joined
from quant.checkpoints.protocol import CheckpointError
from quant.digest import CONFIG, ManifestEntry, folder_digest, weight_files
from quant.export.protocol import QUANTIZABLE
from quant.plan import Plan, PlanLayer
from quant.safetensors_header import Header, TensorEntry, read_header

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of stored weights that can be quantized: safetensors' name -> torch's."""


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor that holds the weight of a layer of a plan.

    `part_of` names the parameter that transformers joins it into with others (`Source.joined`), for experts
    that are stored apart; None for a tensor that is the layer's weight as it is.
    """

    file: str
    tensor: str
    layer: str
    entry: TensorEntry
    part_of: str | None = None


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder: digest of its content, manifest, and headers of its safetensors files."""

    folder: Path
    digest: str
    manifest: tuple[ManifestEntry, ...]
    headers: Mapping[str, Header]

    @classmethod
    def open(cls, folder: Path | str) -> Source:
        """Read names, digests and headers. Raises FolderError or HeaderError."""
        path = Path(folder)
        content, manifest = folder_digest(path)
        return cls(path, content, manifest, {name: read_header(path / name) for name in weight_files(path)})

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`. Raises CheckpointError when it is no JSON object."""
        try:
            value = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{CONFIG} must be JSON. Got {error}. Save the model again.") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{CONFIG} must be a JSON object. Got {value!r:.60}. Save the model again.")
        return value

    def stored(self, plan: Plan) -> tuple[StoredTensor, ...]:
        """The stored tensors of every layer, in the order of files and offsets.

        Tied weights may be stored once, or under each of their names; fused experts may be stored apart.
        Raises CheckpointError for a layer without a tensor, or one of another shape or type.
        """
        found = [
            StoredTensor(self.entries[tensor][0], tensor, layer, self.entries[tensor][1], part_of)
            for tensor, (layer, part_of) in self.places(plan).holders.items()
        ]
        for name, layer in plan.layers.items():
            _check(name, layer, [item for item in found if item.layer == name])
        return tuple(sorted(found, key=lambda item: (item.file, item.entry.start)))

    def place(self, plan: Plan, tensor: str) -> tuple[str, TensorEntry]:
        """Where a tensor of the model other than a layer's weight is stored: its file and entry.

        Raises CheckpointError when it is not stored as it is.
        """
        try:
            name = renaming(plan, _own_places(self.entries))(tensor)
        except CheckpointError:
            parts = self.joined.parts.get(tensor, ())
            name = parts[0].tensor if len(parts) == 1 and not self.joined.converted(tensor) else tensor
        if name not in self.entries:
            raise CheckpointError(
                f"Checkpoint must hold the tensor {tensor!r}, which the plan corrects. Got none of that name."
                " Save the model again with save_pretrained(), and plan for that folder."
            )
        return self.entries[name]

    def places(self, plan: Plan) -> Places:
        """Where the plan's weights are stored. Raises CheckpointError for a layer without a tensor."""
        return Places.of(plan, self.entries, lambda: self.joined)

    @cached_property
    def joined(self) -> Joined:
        """Which stored tensors make up which parameter, as transformers reads them."""
        return Joined.of(self.folder, self.entries)

    @cached_property
    def entries(self) -> dict[str, tuple[str, TensorEntry]]:
        """Tensor name -> its file and entry."""
        return {
            tensor: (file, entry)
            for file, header in self.headers.items()
            for tensor, entry in header.tensors.items()
        }


@dataclass(frozen=True)
class Places:
    """Where the weights of a plan are stored: how paths are spelled there, the tensors of each spelled path,
    and the parameter that a tensor is joined into, if any.
    """

    plan: Plan
    rename: Renaming
    tensors: Mapping[str, tuple[str, ...]]
    joined: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan, names: Iterable[str], joined: Callable[[], Joined]) -> Places:
        """Of stored tensors by their names; `joined` is asked when a layer has no tensor of its own name.

        Raises CheckpointError where that does not help.
        """
        tensors, parts = _own_places(names), dict[str, str]()
        try:
            return cls(plan, renaming(plan, tensors), tensors, parts)
        except CheckpointError:
            known = joined()
        for parameter, members in known.parts.items():
            found = tuple(part.tensor for part in members)
            tensors.setdefault(parameter.removesuffix(".weight"), found)
            if known.converted(parameter):
                parts |= dict.fromkeys(found, parameter)
        return cls(plan, renaming(plan, tensors), tensors, parts)

    @property
    def holders(self) -> dict[str, tuple[str, str | None]]:
        """Tensor name -> the layer whose weight it holds, and the parameter that it is joined into."""
        return {
            tensor: (name, self.joined.get(tensor))
            for name, layer in self.plan.layers.items()
            for path in (name, *layer.aliases)
            for tensor in self.tensors.get(self.rename(path), ())
        }


def _own_places(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {name.removesuffix(".weight"): (name,) for name in names}


@dataclass(frozen=True)
class Renaming:
    """From module paths to tensor names: put a prefix before them, or take one away."""

    add: str = ""
    drop: str = ""

    def __call__(self, path: str) -> str:
        """The tensor name, without .weight, of a module path."""
        return self.add + path.removeprefix(self.drop)


def renaming(plan: Plan, places: Collection[str]) -> Renaming:
    """How the checkpoint spells module paths: as they are, or with one prefix more or less.

    A base model loaded from a task model's checkpoint ("bert.encoder..." for "encoder...") and the other
    way round are read so.
    """

    def missing(rename: Renaming) -> list[str]:
        return [
            name
            for name, layer in plan.layers.items()
            if not any(rename(path) in places for path in (name, *layer.aliases))
        ]

    plain = missing(Renaming())
    if not plain:
        return Renaming()
    first = plain[0]
    tails = {
        *(Renaming(add=key.removesuffix(first)) for key in places if key.endswith(f".{first}")),
        *(Renaming(drop=first.removesuffix(key)) for key in places if first.endswith(f".{key}")),
    }
    fitting = [rename for rename in tails if not missing(rename)]
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"Checkpoint must hold the weight of every layer of the plan. Got none for {', '.join(plain[:3])}"
        f" ({len(plain)} in all). Save the model again with save_pretrained(), and plan for that folder."
    )


def _check(name: str, layer: PlanLayer, places: Sequence[StoredTensor]) -> None:
    for place in places:
        if place.entry.dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {place.tensor!r} must be stored as one of {', '.join(FLOATS)}."
                f" Got {place.entry.dtype}. Start from the original checkpoint."
            )
        if place.part_of is None and place.entry.shape != layer.shape:
            raise CheckpointError(
                f"Tensor {place.tensor!r} must have the shape {layer.shape} of layer {name!r}."
                f" Got {place.entry.shape}. Pass the plan's own model."
            )
    stored = sum(prod(place.entry.shape) for place in places if place.part_of is not None)
    if stored % layer.parameters:
        raise CheckpointError(
            f"The tensors that make up layer {name!r} must hold its {layer.parameters} values. Got {stored}"
            f" in {len(places)} tensors from {places[0].tensor!r} on. Pass the plan's own model."
        )
    if layer.op not in QUANTIZABLE:
        raise CheckpointError(
            f"Layer {name!r} must be one of {', '.join(QUANTIZABLE)}. Got {layer.op!r:.60}."
            " Export the plan again."
        )
