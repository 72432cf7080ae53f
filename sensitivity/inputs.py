"""Second moments of layers' inputs over the scoring part, at full precision: what GPTQ and its kin go by.

One forward pass over the part serves as many layers as fit in memory, in the model's order; what was dropped
is collected again. The numbers do not depend on which layers share a pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant.experts import expert_inputs, gives_inner_inputs, routed
from quant.inputs import LayerInputs
from quant.layers import EXPERT_OPS, Inventory, Layer
from sensitivity.errors import MemoryLimitTooLow
from sensitivity.memory import CACHE_BYTES
from sensitivity.tasks.task import Batch

LARGEST_BYTES = 2**33
"""Second moments of one layer beyond this are not collected: those of many wide experts."""

Batches = Callable[[], Iterable[Batch]]


class InputStatistics:
    """Statistics by layer name; `batches` gives the micro-batches of the scoring part, always the same.

    Second moments beyond `cache_bytes` are collected again when they are needed; where they are `limited`,
    those of one layer that are larger are refused. `watch` may run only the blocks that hold the layers.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, batches: Batches, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._model, self._inventory, self._batches, self._bound = model, inventory, batches, cache_bytes
        self.watch: Watch = watch_all
        self.limited = False
        self._kept: OrderedDict[str, LayerInputs] = OrderedDict()

    def __call__(self, name: str) -> LayerInputs:
        """The statistics of one layer; the model must hold its own weights. KeyError for no layer.

        Zeros for embeddings, which multiply nothing, for experts whose inputs cannot be seen and for those
        whose statistics are too large: quantizers take such a layer for one that the data never reached.
        """
        layer = self._inventory.by_name[name]
        if not self._observable(layer):
            columns = layer.matrix[1]
            return LayerInputs(torch.zeros(1, columns, columns), samples=0)
        if layer.name not in self._kept:
            if self.limited and self._bytes(layer) > self._bound:
                raise MemoryLimitTooLow(self._bytes(layer), self._bound, f"second moments of {name}")
            wanted = self._neighbors(layer)
            self._make_room(sum(self._bytes(other) for other in wanted))
            self._kept |= collect(self._model, wanted, self._batches(), self.watch)
        self._kept.move_to_end(layer.name)
        return self._kept[layer.name]

    def _neighbors(self, first: Layer) -> list[Layer]:
        """The layer and those after it that are not known, as many as half of the bound holds."""
        layers = self._inventory.layers
        chosen, size = [first], self._bytes(first)
        for layer in layers[layers.index(first) + 1 :]:
            if layer.name in self._kept or not self._observable(layer):
                continue
            more = self._bytes(layer)
            if size + more > self._bound // 2:
                break
            chosen.append(layer)
            size += more
        return chosen

    def _bytes(self, layer: Layer) -> int:
        return 4 * groups_of(self._model, layer) * layer.matrix[1] ** 2

    def _hidden(self, layer: Layer) -> bool:
        """Whether the layer's inputs stay inside a module that does not tell how it computes them."""
        return layer.name.endswith("down_proj") and any(
            not gives_inner_inputs(module)
            for module, _ in places_of(self._model, layer)
            if layer.op in EXPERT_OPS
        )

    def _observable(self, layer: Layer) -> bool:
        return layer.op != "embedding" and not self._hidden(layer) and self._bytes(layer) <= LARGEST_BYTES

    def _make_room(self, size: int) -> None:
        held = sum(inputs.second_moments.nbytes for inputs in self._kept.values())
        while self._kept and held + size > self._bound:
            held -= self._kept.popitem(last=False)[1].second_moments.nbytes


def collect(
    model: nn.Module, layers: Iterable[Layer], batches: Iterable[Batch], watch: Watch | None = None
) -> dict[str, LayerInputs]:
    """One pass over the batches; tied layers see the inputs of all their modules. `watch` may run less of
    the model than `watch_all`.
    """
    sums = {layer.name: _Sum(model, layer) for layer in layers}
    (watch or watch_all)(model, sums.values(), batches)
    return {name: found.inputs() for name, found in sums.items()}


class Watcher(Protocol):
    """Sees the inputs of one layer go by, at every (module, parameter) of `places`."""

    layer: Layer
    places: list[tuple[nn.Module, str]]

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        """One input of one module; `real` (samples, tokens) is false for padding."""

    def add_experts(
        self, module: nn.Module, parameter: str, call: tuple[Tensor, Tensor], real: Tensor | None
    ) -> None:
        """One call of fused experts: hidden states and the experts of each token."""


Watch = Callable[[nn.Module, Collection[Watcher], Iterable[Batch]], None]


def watch_all(model: nn.Module, watchers: Collection[Watcher], batches: Iterable[Batch]) -> None:
    """Run the model over the batches at full precision."""
    for batch in batches:
        with watched(watchers, batch):
            batch.call(model)


@contextmanager
def watched(watchers: Collection[Watcher], batch: Batch) -> Iterator[None]:
    """Watchers see what a run of the batch inside gives their layers.

    The attention backend is fixed, so that the numbers are the same inside and outside of `gradients`.
    """
    fixed = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(False), torch.no_grad(), fixed, _listening(watchers, real_tokens(batch)):
        yield


class _Sum:
    """X'X of one layer, summed in float32 batch by batch, the largest inputs, and the rows that went in."""

    def __init__(self, model: nn.Module, layer: Layer) -> None:
        self.layer, self.places = layer, places_of(model, layer)
        groups, columns = groups_of(model, layer), layer.matrix[1]
        device = next(self.places[0][0].parameters()).device
        self.total = torch.zeros(groups, columns, columns, device=device)
        self.largest = torch.zeros(columns, device=device)
        self.samples = 0

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        for rows in input_rows(module, values, real):
            self.total += rows.transpose(1, 2) @ rows
            self._enlarge(rows.flatten(0, 1))
            self.samples += rows.shape[1]

    def _enlarge(self, rows: Tensor) -> None:
        if len(rows):
            self.largest = torch.maximum(self.largest, torch.linalg.vector_norm(rows, torch.inf, dim=0))

    def add_experts(
        self, module: nn.Module, parameter: str, call: tuple[Tensor, Tensor], real: Tensor | None
    ) -> None:
        hidden, indices = call
        for expert, rows in expert_inputs(module, parameter, hidden, without_padding(indices, real)):
            exact = rows.float()
            self.total[expert] += exact.t() @ exact
            self._enlarge(exact)
            self.samples += len(rows)

    def inputs(self) -> LayerInputs:
        return LayerInputs(self.total / max(1, self.samples), self.samples, self.largest)


def without_padding(indices: Tensor, real: Tensor | None) -> Tensor:
    """The experts of each token (tokens, k), -1 for padding; `real` (samples, sequence) may stand for several
    passes over the tokens.
    """
    if real is None or len(indices) % real.numel():
        return indices
    kept = real.reshape(-1, 1).to(indices.device).repeat(len(indices) // real.numel(), 1)
    return indices.masked_fill(~kept, -1)


def places_of(model: nn.Module, layer: Layer) -> list[tuple[nn.Module, str]]:
    """Every (module, parameter) that multiplies with the layer's weight, each once."""
    paths = [
        name.rpartition(".")[::2] if layer.op in EXPERT_OPS else (name, "weight") for name in layer.names
    ]
    found = [(model.get_submodule(path), parameter) for path, parameter in paths]
    return list({(id(module), parameter): (module, parameter) for module, parameter in found}.values())


@contextmanager
def _listening(watchers: Iterable[Watcher], real: Tensor | None) -> Iterator[None]:
    hooks: list[Any] = []
    try:
        for found in watchers:
            hooks += [
                module.register_forward_pre_hook(_hook(found, parameter, real), with_kwargs=True)
                for module, parameter in found.places
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(found: Watcher, parameter: str, real: Tensor | None) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if found.layer.op not in EXPERT_OPS:
            found.add(module, (*arguments, *named.values())[0].detach(), real)
            return
        call = routed(module, arguments, named)
        if call is None:
            return
        found.add_experts(module, parameter, call, real)

    return hook


def real_tokens(batch: Batch) -> Tensor | None:
    """True (samples, tokens) where a token is no padding; None where nothing says so."""
    mask = batch.inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def input_rows(module: nn.Module, values: Tensor, real: Tensor | None = None) -> Iterator[Tensor]:
    """What a module multiplies its weight with, as float32 (groups, rows, columns), one piece at a time.

    Padding tokens are left out where the leading sides are those of `real`.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        for image in torch.split(values, 1):
            yield _patches(module, image.float())
        return
    columns = values.shape[-1]
    if real is not None and values.shape[:-1].numel() == real.numel() and values.ndim in (2, 3):
        yield values.reshape(-1, columns)[real.reshape(-1).to(values.device)].float()[None]
    else:
        yield values.reshape(-1, columns).float()[None]


def _patches(module: nn.Conv1d | nn.Conv2d, values: Tensor) -> Tensor:
    """(1, channels, ...) -> (groups, positions, columns), padded as the module pads."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(values, module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        padded = padded.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    unfolded = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    return unfolded.reshape(module.groups, -1, unfolded.shape[-1]).transpose(1, 2)


def groups_of(model: nn.Module, layer: Layer) -> int:
    """How many parts of the output channels have inputs of their own."""
    module = places_of(model, layer)[0][0]
    return module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else layer.experts
