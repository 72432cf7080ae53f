"""Safetensors with the plan's weights quantized and dequantized: what `transformers` loads as it is.

Files are copied; then one tensor at a time is replaced in its own bytes, so shards, types, metadata and all
other tensors stay the same. Experts that are stored apart are joined, quantized and taken apart again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoints.protocol import Layout, OutputFile, Wrote
from quant.checkpoints.source import Source
from quant.export.protocol import Deployment, Violation
from quant.schemes import parse_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """None: any weight can be stored dequantized. Provenance says which inputs and caches the plan rounds."""
    return ()


def layout(source: Source, deployment: Deployment) -> Layout:
    """The source's own files and sizes."""
    payload = {
        name: sum(entry.nbytes for entry in header.tensors.values())
        for name, header in source.headers.items()
    }
    files = tuple(
        OutputFile(entry["path"], entry["size"], payload.get(entry["path"], 0)) for entry in source.manifest
    )
    return Layout(files, sum(item.entry.nbytes for item in source.stored(deployment.plan)))


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Copy the folder's files and write every planned tensor over the copy's bytes."""
    from quant.apply import quantize_dequantize
    from quant.checkpoints.tensors import each_joined, each_stored, tensor_bytes

    for entry in source.manifest:
        shutil.copyfile(source.folder / entry["path"], out / entry["path"])
    layers, stored = deployment.plan.layers, source.stored(deployment.plan)

    def changed(weight: Tensor, name: str) -> Tensor:
        scheme = parse_scheme(layers[name].scheme)
        return quantize_dequantize(weight, layers[name].op, name, scheme, inputs)

    whole = [item for item in stored if item.part_of is None]
    for file, members in groupby(each_stored(source, whole), key=lambda pair: pair[0].file):
        with (out / file).open("r+b") as stream:
            for item, weight in members:
                stream.seek(item.entry.start)
                stream.write(tensor_bytes(changed(weight, item.layer)))
                wrote(item.layer)
    for parts, weight in each_joined(source, stored):
        layer, parameter = parts[0].layer, str(parts[0].part_of)
        pieces = source.joined.apart(parameter, changed(weight, layer))
        for item in parts:
            with (out / item.file).open("r+b") as stream:
                stream.seek(item.entry.start)
                stream.write(tensor_bytes(pieces[item.tensor]))
        wrote(layer)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """The stored weights as they are."""
    from quant.checkpoints.tensors import each_joined, each_stored

    source = Source.open(place)
    stored = source.stored(deployment.plan)
    for item, weight in each_stored(source, (item for item in stored if item.part_of is None)):
        yield item.layer, weight
    for parts, weight in each_joined(source, stored):
        yield parts[0].layer, weight
