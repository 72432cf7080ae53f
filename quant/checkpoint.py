"""Writing a loadable checkpoint whose weights are a plan's: quantized, then dequantized."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.apply import InputsOf, quantize_dequantize
from quant.catalog import QUANTIZERS
from quant.digest import canonical_json, folder_digest, weight_files
from quant.plan import Plan, PlanLayer, plan_json
from quant.safetensors_header import Header, TensorEntry, read_header
from quant.schemes import parse_scheme

PLAN_FILE = "bitplan_plan.json"
PROVENANCE_FILE = "bitplan_provenance.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A plan that does not fit a checkpoint, or an output folder that is in use."""


@dataclass(frozen=True)
class Provenance:
    """Where a written checkpoint comes from. `mismatches` are what `force` overrode, in words."""

    schema: str
    plan: str
    model: str
    tensors: int
    forced: bool
    mismatches: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """One stored tensor that the plan changes."""

    file: str
    tensor: str
    layer: str
    entry: TensorEntry


def apply_plan(
    model_dir: Path | str,
    plan: Plan,
    out_dir: Path | str,
    *,
    force: bool = False,
    inputs: InputsOf | None = None,
) -> Provenance:
    """Copy a Hugging Face folder with the plan's weights in it, in the same types.

    Files are copied as they are; then one tensor at a time is quantized, dequantized and written over its
    own bytes, so shards, metadata and all other tensors stay the same. The plan and where the checkpoint
    comes from are written beside them. The folder appears whole or not at all. `inputs` gives statistics of
    the layers in `plan.needs_calibration`, from the plan's own calibration data read as the plan says.

    Raises CheckpointError when those are needed and not given, when the plan was made for another model or
    with other quantizer versions (unless `force`; the provenance file then says so), when its layers are
    not the checkpoint's, or when `out_dir` holds files; FolderError, HeaderError and NonFinite as their
    names say.
    """
    require_inputs(plan, given=inputs is not None)
    source, out = Path(model_dir), Path(out_dir)
    model, manifest = folder_digest(source)
    mismatches = tuple(_mismatches(plan, model))
    if mismatches and not force:
        raise CheckpointError(f"{' '.join(mismatches)} Pass the plan's own model, or force it.")
    headers = {name: read_header(source / name) for name in weight_files(source)}
    targets = _targets(plan, headers)
    _require_free(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for entry in manifest:
            shutil.copyfile(source / entry["path"], partial / entry["path"])
        _rewrite(source, partial, plan, targets, inputs)
        forced = bool(mismatches)
        found = Provenance("bitplan.provenance/1", plan.digest, model, len(targets), forced, mismatches)
        (partial / PLAN_FILE).write_text(plan_json(plan), encoding="utf-8")
        (partial / PROVENANCE_FILE).write_text(canonical_json(asdict(found)), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def require_inputs(plan: Plan, *, given: bool) -> None:
    """Raise CheckpointError when the plan needs statistics of inputs that are not given."""
    needing = plan.needs_calibration
    if needing and not given:
        raise CheckpointError(
            f"Plan must be applied with its calibration data. Got none, and {needing[0]} is"
            f" {plan.layers[needing[0]].scheme}, whose quantizer goes by them ({len(needing)} such"
            " layers). Pass --calibration FILE."
        )


def _mismatches(plan: Plan, model: str) -> Iterator[str]:
    if plan.digests.model != model:
        made_for = plan.digests.model or "a model without a digest"
        yield f"Plan must be made for this model. Got a plan for {made_for}, and the model {model}."
    for name, version in plan.quantizers.items():
        ours = QUANTIZERS[name].version if name in QUANTIZERS else None
        if version != ours:
            yield f"Plan must use quantizer {name} version {ours}. Got version {version}."


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"Output folder must be new or empty. Got {str(out)!r}, which is in use. Name another one."
        )


def _targets(plan: Plan, headers: Mapping[str, Header]) -> list[Target]:
    """Every stored tensor of every layer; tied weights may be stored once or under each of their names."""
    places = {
        tensor.removesuffix(".weight"): (file, tensor, entry)
        for file, header in headers.items()
        for tensor, entry in header.tensors.items()
        if tensor.endswith(".weight")
    }
    rename = _renaming(plan, places)
    targets = []
    for name, layer in plan.layers.items():
        for path in (name, *layer.aliases):
            key = rename(path)
            if key in places:
                file, tensor, entry = places[key]
                _check(name, layer, tensor, entry)
                targets.append(Target(file, tensor, name, entry))
    return sorted(targets, key=lambda target: (target.file, target.entry.start))


@dataclass(frozen=True)
class Renaming:
    """From module paths to tensor names: put a prefix before them, or take one away."""

    add: str = ""
    drop: str = ""

    def __call__(self, path: str) -> str:
        """The tensor name, without .weight, of a module path."""
        return self.add + path.removeprefix(self.drop)


def _renaming(plan: Plan, places: Mapping[str, Any]) -> Renaming:
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


def _rewrite(source: Path, out: Path, plan: Plan, targets: list[Target], inputs: InputsOf | None) -> None:
    """Write every target's bytes over the copy's, one tensor at a time."""
    for file in sorted({target.file for target in targets}):
        with safe_open(source / file, framework="pt") as tensors, (out / file).open("r+b") as stream:
            for target in targets:
                if target.file == file:
                    layer = plan.layers[target.layer]
                    scheme = parse_scheme(layer.scheme)
                    weight = tensors.get_tensor(target.tensor)
                    stream.seek(target.entry.start)
                    changed = quantize_dequantize(weight, layer.op, target.layer, scheme, inputs)
                    stream.write(_bytes(changed))


def _bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes in memory order; bfloat16 has no numpy type of its own."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy().tobytes())
