"""Safetensors with the plan's weights quantized and dequantized: what `transformers` loads as it is.

Files are copied; then one tensor at a time is replaced in its own bytes, so shards, types, metadata and all
other tensors stay the same.
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
    """None: whatever can be quantized can be stored dequantized."""
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
    from quant.checkpoints.tensors import each_stored, tensor_bytes

    layers = deployment.plan.layers
    for entry in source.manifest:
        shutil.copyfile(source.folder / entry["path"], out / entry["path"])
    tensors = each_stored(source, source.stored(deployment.plan))
    for file, members in groupby(tensors, key=lambda pair: pair[0].file):
        with (out / file).open("r+b") as stream:
            for item, weight in members:
                layer = layers[item.layer]
                scheme = parse_scheme(layer.scheme)
                changed = quantize_dequantize(weight, layer.op, item.layer, scheme, inputs)
                stream.seek(item.entry.start)
                stream.write(tensor_bytes(changed))
                wrote(item.layer)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """The stored weights as they are."""
    from quant.checkpoints.tensors import each_stored

    source = Source.open(place)
    for item, weight in each_stored(source, source.stored(deployment.plan)):
        yield item.layer, weight
