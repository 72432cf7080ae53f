"""The static check of a whole model: its files against each other, without loading a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from service.errors import Unprocessable
from service.ingest.companions import check_companion
from service.ingest.kinds import check_model_files
from service.ingest.model_config import already_quantized, check_config
from service.ingest.safetensors_header import TensorEntry, read_header
from service.ingest.shard_index import check_index
from service.ingest.strict_json import parse_object

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
QUANTIZED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".SCB")
LARGEST_CONFIG = 1_000_000


@dataclass(frozen=True)
class ModelFacts:
    """What the files say before anything is loaded; `weight_bytes` counts stored tensors only."""

    model_type: str
    architectures: tuple[str, ...]
    tensors: int
    parameters: int
    weight_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For the model's summary."""
        return {
            "model_type": self.model_type,
            "architectures": list(self.architectures),
            "tensors": self.tensors,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
        }


def check_model(files: Mapping[str, Path]) -> ModelFacts:
    """Check the files of a model, given as manifest name -> place on disk; raises ServiceError for the first
    fault.
    """
    check_model_files(sorted(files))
    model_type, config = check_small_files(files)
    shards = {name: _header(name, files[name]) for name in sorted(files) if name.endswith(".safetensors")}
    _check_shards(files, shards)
    entries = [entry for tensors in shards.values() for entry in tensors]
    _check_dtypes(entries)
    architectures = config.get("architectures")
    return ModelFacts(
        model_type=model_type,
        architectures=tuple(str(item) for item in architectures) if isinstance(architectures, list) else (),
        tensors=len(entries),
        parameters=sum(prod(entry.shape) for entry in entries if entry.dtype in FLOATING),
        weight_bytes=sum(entry.bytes for entry in entries),
    )


def check_small_files(files: Mapping[str, Path]) -> tuple[str, dict[str, Any]]:
    """Check config.json and the files of tokenizer and processor alone, before weights are looked at; gives
    the model_type and the configuration.
    """
    config = parse_object(
        _read(files["config.json"], LARGEST_CONFIG, "config.json"), what="config.json", slug="invalid-config"
    )
    model_type = check_config(config)
    for name in sorted(files):
        check_companion(name, files[name])
    return model_type, config


def _header(name: str, path: Path) -> tuple[TensorEntry, ...]:
    with path.open("rb") as file:
        return read_header(file, path.stat().st_size, name=name)


def _read(path: Path, largest: int, name: str) -> bytes:
    if (size := path.stat().st_size) > largest:
        raise Unprocessable("invalid-config", f"{name} must have at most {largest} bytes. Got {size}.")
    return path.read_bytes()


def _check_shards(files: Mapping[str, Path], shards: Mapping[str, tuple[TensorEntry, ...]]) -> None:
    indexes = [name for name in sorted(files) if name.endswith(".safetensors.index.json")]
    for name in indexes:
        check_index(_read(files[name], 100_000_000, name), name, shards)
    if len(shards) > 1 and not indexes:
        raise Unprocessable(
            "missing-file",
            f"A model of several safetensors files must have model.safetensors.index.json. Got "
            f"{', '.join(shards)} without it. Send the folder that model.save_pretrained(folder) writes.",
            pointer="/files",
            extra={"missing": ["model.safetensors.index.json"]},
        )
    names = Counter(entry.name for tensors in shards.values() for entry in tensors)
    for twice, _ in (pair for pair in names.most_common(1) if pair[1] > 1):
        raise Unprocessable(
            "invalid-safetensors",
            f"Tensor names must be unique over all shards. Got {twice!r} twice. Send the shards of one "
            "checkpoint.",
        )


def _check_dtypes(entries: list[TensorEntry]) -> None:
    for entry in entries:
        if entry.name.endswith(QUANTIZED_NAMES) or (
            entry.name.endswith("weight") and entry.dtype not in FLOATING and len(entry.shape) >= 2
        ):
            raise already_quantized(f"tensor {entry.name[:200]!r} of dtype {entry.dtype}")
    if not any(entry.dtype in FLOATING and len(entry.shape) >= 2 for entry in entries):
        raise Unprocessable(
            "nothing-to-quantize",
            "A model must have at least one floating-point weight of two or more dimensions (a linear, "
            "convolution "
            f"or embedding layer). Got {len(entries)} tensors without one. Send a model with such layers.",
        )
