"""Whether gradients can go through a model block by block, and how its blocks are called.

They can where a block is given nothing that depends on other blocks but the one before it, and the outputs
depend on the last block alone. One run of one sample shows it: its graph is cut between the blocks, so that
a gradient that arrives at a cut has come another way. The same run shows what memory a block takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_iter, tree_map_only

from quant.layers import Layer
from sensitivity.gradients import gradients

Slot = int | str
"""Where in a call the output of the block before goes: a position or a name."""


class NoChain(Exception):  # noqa: N818 - says what was found
    """Gradients cannot go block by block, and why."""


@dataclass(frozen=True)
class Call:
    """A call of a block without what the block before gave."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    slot: Slot

    @classmethod
    def of(cls, arguments: tuple[Any, ...], named: Mapping[str, Any], slot: Slot) -> Call:
        """The call, and nothing of its first tensor."""
        if isinstance(slot, int):
            return cls((*arguments[:slot], None, *arguments[slot + 1 :]), named, slot)
        return cls(arguments, {**named, slot: None}, slot)

    def given(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the tensor in its place."""
        if isinstance(self.slot, int):
            return (*self.arguments[: self.slot], hidden, *self.arguments[self.slot + 1 :]), dict(self.named)
        return self.arguments, {**self.named, self.slot: hidden}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor replaced."""
        arguments, named = tree_map_only(Tensor, change, (self.arguments, dict(self.named)))
        return Call(arguments, named, self.slot)


@dataclass(frozen=True)
class Chain:
    """The blocks in order, and what one sample takes of memory, in bytes.

    slots    where each block expects the output of the one before
    tuples   whether each block gives its output as the first of a tuple
    hidden   of what goes into each block and out of the last: n + 1 numbers
    graphs   what the graph of each block holds for a backward pass
    behind   the same for what follows the blocks
    """

    paths: tuple[str, ...]
    slots: tuple[Slot, ...]
    tuples: tuple[bool, ...]
    hidden: tuple[int, ...]
    graphs: tuple[int, ...]
    behind: int

    @property
    def whole_graph(self) -> int:
        """What the graph of one sample through the whole model holds."""
        return sum(self.graphs) + self.behind

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the model."""
        return [model.get_submodule(path) for path in self.paths]

    def block_of(self, layer: Layer) -> int | None:
        """The block that holds the layer's tensor; None outside of the blocks. Raises NoChain for several."""
        found = {self._index(name) for name in layer.names}
        if len(found) > 1:
            raise NoChain(f"{layer.name} shares its tensor with other parts of the model")
        return found.pop()

    def _index(self, name: str) -> int | None:
        return next((i for i, path in enumerate(self.paths) if f"{name}.".startswith(f"{path}.")), None)

    def output(self, number: int, hidden: Tensor) -> Any:
        """What block `number` would return."""
        return (hidden,) if self.tuples[number] else hidden


def hidden_of(output: Any) -> Tensor:
    """What a block's output gives to the next block."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def find_chain(
    model: nn.Module,
    paths: Sequence[str],
    parameters: Sequence[nn.Parameter],
    objective: Callable[[], Tensor],
) -> Chain:
    """The chain of the blocks at `paths`. `objective` runs one sample and gives a scalar of its outputs.

    Raises NoChain naming the block that is given more, or why the run failed.
    """
    if len(paths) < 2:
        raise NoChain("the model shows no blocks that run one after the other")
    run = _CutRun(model, tuple(paths), parameters)
    try:
        with gradients(parameters, lambda index, gradient: None), run.listening():
            found = objective()
            if found.requires_grad:
                found.backward()  # type: ignore[no-untyped-call]
    except NoChain:
        raise
    except Exception as error:
        raise NoChain(
            f"a run cut between the blocks failed with {type(error).__name__}: {error!s:.200}"
        ) from error
    return run.chain()


class _Saved:
    """Bytes that graphs save for their backward passes, parameters aside; with `keep` off nothing is held."""

    def __init__(self, model: nn.Module, *, keep: bool = True) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._keep, self._alive, self.bytes = keep, set[int](), 0

    def clear(self) -> None:
        """Begin to count anew."""
        self._alive.clear()
        self.bytes = 0

    def listening(self) -> AbstractContextManager[Any]:
        """Count what is saved inside."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._own:
            return tensor
        if not self._keep:
            self.bytes += tensor.nbytes
            return tensor.new_empty(0)
        if storage.data_ptr() not in self._alive:
            self._alive.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@dataclass
class _CutRun:
    model: nn.Module
    paths: tuple[str, ...]
    parameters: Sequence[nn.Parameter]
    slots: list[Slot] = field(default_factory=list)
    tuples: list[bool] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.saved = _Saved(self.model)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, path in enumerate(self.paths):
                block = self.model.get_submodule(path)
                stack.callback(block.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._after(number)).remove)
            stack.enter_context(self.saved.listening())
            yield

    def chain(self) -> Chain:
        if len(self.leaves) != len(self.paths):
            raise NoChain(f"{self.paths[len(self.leaves)]} was not called")
        for path, leaf in zip(self.paths[:-1], self.leaves[:-1], strict=True):
            if leaf.grad is not None:
                raise NoChain(f"the outputs depend on {path} by more than the next block")
        if self.leaves[-1].grad is None:
            raise NoChain(f"the outputs do not depend on {self.paths[-1]}")
        return Chain(
            self.paths,
            tuple(self.slots),
            tuple(self.tuples),
            (*self.hidden, self.leaves[-1].nbytes),
            tuple(self.graphs),
            self.saved.bytes,
        )

    def _before(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            path = self.paths[number]
            if len(self.leaves) != number:
                raise NoChain(f"{path} is called out of order, or more than once")
            slot = self._slot(number, arguments, named)
            if slot is None:
                raise NoChain(f"{path} is not given just what the block before it gives")
            hidden = arguments[slot] if isinstance(slot, int) else named[slot]
            call = Call.of(arguments, named, slot)
            if any(
                isinstance(v, Tensor) and v.requires_grad for v in tree_iter((call.arguments, call.named))
            ):
                raise NoChain(f"{path} is given more that gradients go through")
            self.slots.append(slot)
            self.hidden.append(hidden.nbytes)
            self.saved.clear()
            return call.given(hidden.detach().requires_grad_().clone())

        return hook

    def _slot(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Slot | None:
        entries: list[tuple[Slot, Any]] = [*enumerate(arguments), *named.items()]
        for slot, value in entries:
            if isinstance(value, Tensor) and (
                value.is_floating_point() if number == 0 else value is self.leaves[-1]
            ):
                return slot
        return None

    def _after(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            tensors = [value for value in tree_iter(output) if isinstance(value, Tensor)]
            several = isinstance(output, tuple)
            if len(tensors) != 1 or tensors[0] is not (output[0] if several else output):
                raise NoChain(f"{self.paths[number]} must give one tensor, and gives {len(tensors)}")
            self.graphs.append(self.saved.bytes)
            if tensors[0].requires_grad:
                tensors[0].backward(torch.ones_like(tensors[0]))
            self.saved.clear()
            self.leaves.append(tensors[0].detach().requires_grad_())
            self.tuples.append(several)
            return (self.leaves[-1], *output[1:]) if several else self.leaves[-1]

        return hook


def graph_bytes(model: nn.Module, parameters: Sequence[nn.Parameter], objective: Callable[[], Tensor]) -> int:
    """What the graph of one sample through the whole model would hold; it is not held."""
    counted = _Saved(model, keep=False)
    with gradients(parameters), counted.listening():
        objective()
    return counted.bytes
