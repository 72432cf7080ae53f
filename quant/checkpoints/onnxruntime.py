"""An ONNX model whose planned linear layers are MatMulNBits nodes with exactly the plan's values.

`model.onnx` holds the graph, `model.onnx.data` every weight (so no 2 GiB limit applies). Nodes of linear
layers are named by module path; their metadata names the module. The model is in float32 and has no
key-value cache: ONNX Runtime's kernels for a CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoints.protocol import Layout, OutputFile, Wrote
from quant.export.protocol import Deployment, Violation
from quant.export.rules import Takes, no_additions, one_cache, only_formats, only_ops

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf
    from quant.checkpoints.source import Source

MODEL, DATA = "model.onnx", "model.onnx.data"
OPS = ("linear", "transformers_conv1d")
BLOCKS = (16, 32, 64, 128, 256)
WIDTHS = (2, 4, 8)
TAKES = (Takes("int", symmetric=WIDTHS, asymmetric=WIDTHS, scales=BLOCKS, whole_groups=False),)


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the rules of MatMulNBits on a CPU."""
    return (
        *no_additions(deployment),
        *one_cache(deployment, ()),
        *only_ops(deployment, OPS),
        *only_formats(deployment, *TAKES),
    )


def layout(source: Source, deployment: Deployment) -> Layout:
    """Traces the graph with weights that have shapes only, and lays out both files."""
    from quant.checkpoints.onnx_model import lay_out

    model = lay_out(source, deployment)
    files = [OutputFile(MODEL, len(model.proto)), OutputFile(DATA, model.data_bytes, model.payload_bytes)]
    files += [OutputFile(name, size) for name, size in _others(source).items()]
    return Layout(tuple(files), model.planned_bytes)


def write(source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote) -> None:
    """Write the graph, then one weight at a time to its place, and copy what is neither."""
    from quant.checkpoints.onnx_model import lay_out, write_data

    model = lay_out(source, deployment)
    (out / MODEL).write_bytes(model.proto)
    write_data(model, source, deployment, out / DATA, inputs, wrote)
    for name in _others(source):
        shutil.copyfile(source.folder / name, out / name)


def read_back(place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
    """Dequantized from the nodes' own inputs and attributes, read with onnx."""
    from quant.checkpoints.onnx_model import read_weights

    return read_weights(place, deployment)


def _others(source: Source) -> dict[str, int]:
    """Files of the source that hold no weights, with their sizes."""
    return {
        entry["path"]: entry["size"]
        for entry in source.manifest
        if entry["path"] not in source.headers and not entry["path"].endswith(".safetensors.index.json")
    }
