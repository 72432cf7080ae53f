"""The ONNX graph of a Hugging Face model, from its configuration alone: weights have names, types and shapes.

Parameters and stored buffers are fake tensors while the graph is traced, so a model of any size needs no
memory for them, and a dry run and the real one see the same graph.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from quant.checkpoints.protocol import CheckpointError
from quant.digest import CONFIG

INNER = "model."
"""What the traced wrapper puts before every name."""
OPSET = 20
BATCH, LENGTH, SIDE = 2, 6, 64
"""Sizes of the inputs that the graph is traced with; it takes any batch, length and (without a fixed image
size) side."""


@dataclass(frozen=True)
class Graph:
    """An ONNX model without its weights.

    `proto` is a serialized ModelProto whose initializers are the constants of the graph. `weights` names the
    parameters and stored buffers that it reads, with their shapes; all are float32 in it. `tied` gives the
    other names of those that several modules share, `prefix` what stands before names in checkpoints of the
    same model with a head (or does not stand there without one).
    """

    proto: bytes
    weights: dict[str, tuple[int, ...]]
    tied: dict[str, tuple[str, ...]]
    prefix: str


def trace(folder: Path) -> Graph:
    """The graph of the model that a folder's `config.json` describes. Raises CheckpointError."""
    return _trace((folder / CONFIG).read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _trace(config: str) -> Graph:
    model = _model(config)
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return _export(model)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"Model must be one that torch.onnx.export traces. Got {type(error).__name__}:"
                f" {error!s:.300}. Use another consumer."
            ) from error


def _model(text: str) -> nn.Module:
    """The model of a configuration in float32, with fake weights."""
    import transformers

    try:
        value = json.loads(text)
        config = transformers.CONFIG_MAPPING[value["model_type"]].from_dict(value)
    except Exception as error:
        raise CheckpointError(
            f"{CONFIG} must describe a model of transformers. Got {error!r:.300}. Save the model again."
        ) from error
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{CONFIG} must name a model class of transformers. Got {name!r:.80}. Save the model again."
        )
    config.dtype, config.use_cache = torch.float32, False
    with _fake_weights():
        model: nn.Module = kind(config)
    return model


@contextlib.contextmanager
def _fake_weights() -> Iterator[None]:
    """Modules built meanwhile hold fake parameters and stored buffers; other buffers keep their values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameter, buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, FakeTensor):
            param = nn.Parameter(mode.from_tensor(param.detach()), requires_grad=False)
        parameter(self, name, param)

    def register_buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and persistent and tensor.is_floating_point():
            tensor = mode.from_tensor(tensor)
        buffer(self, name, tensor, persistent)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = buffer  # type: ignore[method-assign]


class _Wrapper(nn.Module):
    """Gives the tensors of a model's answer as a tuple, and tells their names."""

    def __init__(self, model: nn.Module, tell: Callable[[list[str]], object]) -> None:
        super().__init__()
        self.model, self.tell = model, tell

    def answer(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """One pass."""
        answer = self.model(**inputs)
        names = [name for name, value in answer.items() if isinstance(value, Tensor)]
        self.tell(names)
        return tuple(answer[name] for name in names)


class _Text(_Wrapper):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.answer(input_ids=input_ids, attention_mask=attention_mask)


class _Images(_Wrapper):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.answer(pixel_values=pixel_values)


def _inputs(model: Any) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Inputs to trace with, and which of their dimensions may change."""
    if model.main_input_name == "input_ids":
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        dims = {0: "batch", 1: "sequence"}
        return (
            {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
            {"input_ids": dims, "attention_mask": dims},
        )
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None)
        sides = [size, size] if isinstance(size, int) else size or [SIDE, SIDE]
        images = torch.zeros(BATCH, getattr(model.config, "num_channels", 3), *sides)
        return {"pixel_values": images}, {
            "pixel_values": {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
        }
    raise CheckpointError(
        f"Model must take input_ids or pixel_values. Got {model.main_input_name!r}. Use another consumer."
    )


def _export(model: Any) -> Graph:
    inputs, dynamic = _inputs(model)
    outputs: dict[str, None] = {}
    kind = _Text if "input_ids" in inputs else _Images
    wrapper = kind(model, lambda names: outputs.update(dict.fromkeys(names))).eval()
    program: Any = torch.onnx.export(
        wrapper, (), kwargs=inputs, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
        dynamic_shapes=dynamic,
    )  # fmt: skip
    weights = _take_weights(program.model.graph)
    program.optimize()
    proto = _serialized(program.model, list(outputs), set(inputs))
    return Graph(proto, weights, _tied(model), f"{model.base_model_prefix}.")


def _take_weights(graph: Any) -> dict[str, tuple[int, ...]]:
    """Turn fake initializers into inputs, which the optimizer leaves alone; gives names and shapes."""
    found = {}
    for value in list(graph.initializers.values()):
        tensor = getattr(value.const_value, "raw", None)
        if isinstance(tensor, FakeTensor):
            del graph.initializers[value.name]
            value.const_value = None
            graph.inputs.append(value)
            found[value.name.removeprefix(INNER)] = tuple(tensor.shape)
    return found


def _serialized(model: Any, outputs: list[str], inputs: set[str]) -> bytes:
    """A ModelProto without traces of the machine that made it; weights and outputs have their own names."""
    import onnx_ir

    names = {value.name: name for value, name in zip(model.graph.outputs, outputs, strict=True)}
    for value in model.graph.inputs:
        if value.name not in inputs:
            value.name = value.name.removeprefix(INNER)
    for value in model.graph.outputs:
        value.name = names[value.name]
    proto: Any = onnx_ir.serde.serialize_model(model)
    graph = proto.graph
    proto.producer_name, graph.name = "bitplan", "model"
    for field in ("producer_version", "doc_string", "metadata_props"):
        proto.ClearField(field)
    kept = [value for value in graph.input if value.name in inputs]
    for field in ("input", "value_info", "metadata_props", "doc_string"):
        graph.ClearField(field)
    graph.input.extend(kept)
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    return bytes(proto.SerializeToString(deterministic=True))


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in shared if other != name)
        for shared in names.values()
        for name in shared
        if len(shared) > 1
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages that Bitplan does without."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
