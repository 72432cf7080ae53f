"""A model folder as the source of a checkpoint: its files, and which stored tensor is which layer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.checkpoints.protocol import CheckpointError
from quant.digest import CONFIG, ManifestEntry, folder_digest, weight_files
from quant.export.protocol import QUANTIZABLE
from quant.plan import Plan, PlanLayer
from quant.safetensors_header import Header, TensorEntry, read_header

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of stored weights that can be quantized: safetensors' name -> torch's."""


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor that holds the weight of a layer of a plan."""

    file: str
    tensor: str
    layer: str
    entry: TensorEntry


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

        Tied weights may be stored once, or under each of their names. Raises CheckpointError for a layer
        without a tensor, or one of another shape or type.
        """
        places = {tensor: file for file, header in self.headers.items() for tensor in header.tensors}
        found = []
        for name, keys in self.keys(plan).items():
            for tensor in (f"{key}.weight" for key in keys):
                if tensor not in places:
                    raise _lacking([name])
                entry = self.headers[places[tensor]].tensors[tensor]
                _check(name, plan.layers[name], tensor, entry)
                found.append(StoredTensor(places[tensor], tensor, name, entry))
        return tuple(sorted(found, key=lambda item: (item.file, item.entry.start)))

    def keys(self, plan: Plan) -> dict[str, list[str]]:
        """Layer name -> the beginnings of its tensors' names, as this folder spells them.

        A quantized layer may be stored in several tensors, `<key>.weight_packed` for one. Raises
        CheckpointError for a layer that is not stored.
        """
        tensors = (tensor for header in self.headers.values() for tensor in header.tensors)
        known = {tensor.rpartition(".weight")[0] for tensor in tensors if ".weight" in tensor}
        rename = _renaming(plan, known)
        return {
            name: [key for key in dict.fromkeys(map(rename, (name, *layer.aliases))) if key in known]
            for name, layer in plan.layers.items()
        }


@dataclass(frozen=True)
class Renaming:
    """From module paths to tensor names: put a prefix before them, or take one away."""

    add: str = ""
    drop: str = ""

    def __call__(self, path: str) -> str:
        """The tensor name, without .weight, of a module path."""
        return self.add + path.removeprefix(self.drop)


def _renaming(plan: Plan, places: Collection[str]) -> Renaming:
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
    raise _lacking(plain)


def _lacking(layers: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint must hold the weight of every layer of the plan. Got none for {', '.join(layers[:3])}"
        f" ({len(layers)} in all). Save the model again with save_pretrained(), and plan for that folder."
    )


def _check(name: str, layer: PlanLayer, tensor: str, entry: TensorEntry) -> None:
    if entry.shape != layer.shape:
        raise CheckpointError(
            f"Tensor {tensor!r} must have the shape {layer.shape} of layer {name!r}. Got {entry.shape}."
            " Pass the plan's own model."
        )
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"Tensor {tensor!r} must be stored as one of {', '.join(FLOATS)}. Got {entry.dtype}."
            " Start from the original checkpoint."
        )
    if layer.op not in QUANTIZABLE:
        raise CheckpointError(
            f"Layer {name!r} must be one of {', '.join(QUANTIZABLE)}. Got {layer.op!r:.60}."
            " Export the plan again."
        )
