"""Calibration data as tensors in three seeded, disjoint parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sensitivity.calibration_check import (
    CONTEXT,
    EXTRAS,
    LABELS,
    TENSOR_KINDS,
    check_calibration,
    require_enough_samples,
)
from sensitivity.errors import BadCalibration
from sensitivity.npz import load_arrays
from sensitivity.spec import ALL, PARTS, DataSource, SessionSpec
from sensitivity.tasks.task import Batch
from sensitivity.text import tokenized_samples

_TOKEN_INPUT = "input_ids"  # noqa: S105  (the name of an input, not a secret)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Samples:
    """Inputs by name (n, ...), labels (n, ...) or None, and the rows of each part.

    `positional` names the one input that `forward` does not know by name; `extras` (n, ...) are for the task,
    `contexts` the class of each sample or None.
    """

    tensors: Mapping[str, Tensor]
    labels: Tensor | None
    positional: str | None
    parts: Mapping[str, NDArray[np.int64]]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    contexts: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """All samples in the data, used or not."""
        return len(next(iter(self.tensors.values())))

    def batch(self, rows: NDArray[np.int64], device: torch.device, dtype: torch.dtype) -> Batch:
        """The given rows on `device`; floating inputs in the model's `dtype`."""
        index = torch.as_tensor(rows)
        inputs = {name: _placed(tensor[index], device, dtype) for name, tensor in self.tensors.items()}
        labels = None if self.labels is None else self.labels[index].to(device)
        extras = {name: tensor[index].to(device) for name, tensor in self.extras.items()}
        return Batch(inputs, labels, self.positional, len(rows), extras)

    def batches(self, part: str, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
        """Micro-batches of a part, always cut in the same places."""
        rows = self.parts[part]
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size], device, dtype)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating type of a model's parameters."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return (parameters[0].device, parameters[0].dtype) if parameters else (torch.device("cpu"), torch.float32)


def dtype_name(model: nn.Module) -> str:
    """A model's floating type as people write it: "bfloat16"."""
    return str(placement(model)[1]).removeprefix("torch.")


def is_half(model: nn.Module) -> bool:
    """Whether a model is in half precision."""
    return placement(model)[1] in (torch.float16, torch.bfloat16)


def _placed(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return values.to(device, dtype) if values.is_floating_point() else values.to(device)


def load_samples(spec: SessionSpec, task: str, model: nn.Module) -> Samples:
    """The samples of `spec.calibration` for `model`. Raises BadCalibration naming the row or the tensor."""
    source = spec.calibration
    from_file = source.kind in TENSOR_KINDS
    tensors, contexts = (
        (_read_tensors(source, task), None) if from_file else tokenized_samples(spec, task, model)
    )
    labels = tensors.pop(LABELS, None)
    known = _named_inputs(model)
    extras = {name: tensors.pop(name) for name in EXTRAS if name in tensors and name not in known}
    if CONTEXT in extras:
        contexts = _classes(extras.pop(CONTEXT))
    positional = _positional_input(tensors, model)
    _require_known_tokens(tensors, positional if task == "causal_lm" else None, model)
    count = len(next(iter(tensors.values())))
    require_enough_samples(count)
    return Samples(tensors, labels, positional, split_parts(count, spec.samples, spec.seed), extras, contexts)


def _classes(tensor: Tensor) -> tuple[str, ...]:
    """The class of each sample, as the number it has in the data. Raises BadCalibration."""
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise BadCalibration(
            f"tensor {CONTEXT!r} must hold one whole number per sample. Got {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
    return tuple(str(int(value)) for value in tensor.tolist())


def split_parts(count: int, most: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Rows of the three parts: disjoint, equally long, at most `most` each. "all" holds the first `most` rows
    of the same order: it is for evaluating a finished plan, and overlaps the parts.

    >>> {name: len(rows) for name, rows in split_parts(10, 64, 0).items()}
    {'scoring': 3, 'choosing': 3, 'reporting': 3, 'all': 10}
    """
    size = min(most, count // len(PARTS))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    parts = {part: order[index * size : (index + 1) * size] for index, part in enumerate(PARTS)}
    return {**parts, ALL: order[:most]}


def _read_tensors(source: DataSource, task: str) -> dict[str, Tensor]:
    check_calibration(source.path, source.kind)
    tensors = _load(Path(source.path), source.kind)
    whole = (_TOKEN_INPUT,) if task == "diffusion" else (_TOKEN_INPUT, LABELS)
    return {name: _token_or_value(name, tensor, whole) for name, tensor in tensors.items()}


def _load(path: Path, kind: str) -> dict[str, Tensor]:
    if kind == "npz":
        return {name: torch.from_numpy(array) for name, array in load_arrays(path).items()}
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadCalibration(f"calibration data must be a readable safetensors file. Got {error}.") from error
    return found


def _token_or_value(name: str, tensor: Tensor, whole: Sequence[str]) -> Tensor:
    """Token ids, labels and steps of any whole-number type become int64; everything else stays."""
    if name in whole or name.endswith((LABELS, "timestep")) or "_ids" in name or "mask" in name:
        if tensor.is_floating_point() and name in whole:
            raise BadCalibration(f"tensor {name!r} must hold whole numbers. Got {tensor.dtype}.")
        return tensor.to(torch.int64) if tensor.dtype in (*_WHOLE, torch.bool) else tensor
    return tensor


def _positional_input(tensors: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """None when `forward` knows every name, else the name of the only tensor. Raises BadCalibration."""
    if not tensors:
        raise BadCalibration("calibration data must hold the model's inputs. Got only labels.")
    named = _named_inputs(model)
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    if not named and inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    unknown = sorted(set(tensors) - set(named))
    if unknown and len(tensors) == 1:
        return unknown[0]
    if unknown:
        raise BadCalibration(
            f"tensors must be named after the model's inputs ({', '.join(named)}). "
            f"Got {', '.join(unknown)}. Rename or leave them out; a single tensor is passed by position."
        )
    return None


def _named_inputs(model: nn.Module) -> list[str]:
    """The inputs that `forward` knows by name."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(model.forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind not in variadic]


def _require_known_tokens(tensors: Mapping[str, Tensor], positional: str | None, model: nn.Module) -> None:
    name = positional or _TOKEN_INPUT
    tokens, vocabulary = tensors.get(name), vocabulary_size(model)
    if tokens is None or tokens.is_floating_point() or vocabulary is None:
        return
    bad = (tokens < 0) | (tokens >= vocabulary)
    for row in bad.flatten(1).any(-1).nonzero()[:1, 0].tolist():
        got = int(tokens[row][bad[row]].flatten()[0])
        raise BadCalibration(
            f"token ids in tensor {name!r} must be below the vocabulary of {vocabulary}. "
            f"Got {got} in row {row}. Use the model's own tokenizer."
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the model's input embedding; None for a model without one."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
