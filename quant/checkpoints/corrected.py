"""A source whose biases and batch-norm statistics are a plan's, so that every writer finds them there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoints.protocol import CheckpointError
from quant.checkpoints.source import FLOATS, Source
from quant.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def corrected_source(
    source: Source, plan: Plan, tensors: Mapping[str, Tensor], beside: Path
) -> Iterator[Source]:
    """The source with other values in some stored tensors, in their own types, while the block runs.

    `tensors` go by their names in the model. Files that hold them are copied into a folder in `beside`, which
    is removed afterwards; others are linked. Digest and headers stay the source's. Raises CheckpointError
    for a tensor that is not stored, or not as floats of that shape.
    """
    if not tensors:
        yield source
        return
    import torch

    from quant.checkpoints.tensors import tensor_bytes

    places = {name: source.place(plan, name) for name in tensors}
    folder = Path(tempfile.mkdtemp(prefix=".corrected-", dir=beside))
    try:
        changed = {file for file, _ in places.values()}
        for own in source.folder.iterdir():
            if own.name in changed:
                shutil.copyfile(own, folder / own.name)
            else:
                (folder / own.name).symlink_to(own.absolute())
        for name, (file, entry_of) in places.items():
            if entry_of.dtype not in FLOATS or entry_of.shape != tuple(tensors[name].shape):
                raise CheckpointError(
                    f"Tensor {name!r} must be stored as floats of shape {tuple(tensors[name].shape)}."
                    f" Got {entry_of.dtype} of {entry_of.shape}. Pass the plan's own model."
                )
            with (folder / file).open("r+b") as stream:
                stream.seek(entry_of.start)
                stream.write(tensor_bytes(tensors[name].to(getattr(torch, FLOATS[entry_of.dtype]))))
        yield replace(source, folder=folder)
    finally:
        shutil.rmtree(folder)
