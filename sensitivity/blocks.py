"""The blocks that a model runs one after the other: repeated decoder or encoder layers, stages of a CNN.

Found from the structure (children of ModuleList and Sequential) and from one run: each block is called once,
and its output is the next one's input. A run can then begin at any block whose input is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Blocks:
    """Block i of n, and boundaries k from 0 (before the first) to n (behind the last).

    paths    module paths in the order of their calls; () where the model shows no such chain
    places   module path -> how many blocks are done when it is first called; modules not called are absent
    shares   share of a forward pass's work that is left at boundary k: n + 1 numbers, the first is 1
    bytes    of a block's output for one sample, the largest
    """

    paths: tuple[str, ...] = ()
    places: Mapping[str, int] = field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)
    bytes: int = 0

    def place(self, module: str) -> int:
        """The last boundary that cannot depend on the module: 0 for one that was never called."""
        return self.places.get(module, 0)


def find_blocks(model: nn.Module, run: Callable[[], object]) -> Blocks:
    """The chain of blocks that holds most parameters. `run` makes one forward pass of one sample.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 6))
    >>> blocks = find_blocks(model, lambda: model(torch.zeros(1, 2)))
    >>> blocks.paths, blocks.shares
    (('0', '1', '2'), (1.0, 0.75, 0.75, 0.0))
    """
    calls = _watched(model, run)
    once = [call for call in calls if call.children and call.times == 1 and call.first is not None]
    chains = [_chain(start, once) for start in once]
    chain = max(chains, key=lambda found: sum(_weights(model, call.path) for call in found), default=[])
    chain = [part for call in chain for part in _parts(call, once)]
    if len(chain) < 2:
        return Blocks()
    ends = [call.end for call in chain]
    places = {call.path: sum(end < call.begin for end in ends) for call in calls}
    return Blocks(
        tuple(call.path for call in chain),
        _inside(model, chain, places),
        _shares(chain, calls),
        _bytes(chain),
    )


@contextmanager
def resumed(model: nn.Module, blocks: Blocks, boundary: int, value: Any) -> Iterator[None]:
    """Blocks before the boundary compute nothing: all of them give `value`, the last one's known output."""

    def skip(*_: Any, **__: Any) -> Any:
        return value

    with ExitStack() as stack:
        for path in blocks.paths[:boundary]:
            stack.enter_context(replaced_forward(model.get_submodule(path), skip))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward, whatever wrapped its own before."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def listening(
    model: nn.Module, blocks: Blocks, boundaries: Collection[int], take: Callable[[int, Any], None]
) -> Iterator[None]:
    """`take(k, output of the block before boundary k)` for each of the boundaries that a run passes."""

    def hook_of(boundary: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            take(boundary, output)

        return hook

    with ExitStack() as stack:
        for boundary in boundaries:
            module = model.get_submodule(blocks.paths[boundary - 1])
            stack.callback(module.register_forward_hook(hook_of(boundary)).remove)
        yield


# -- what one run shows ---------------------------------------------------------------------------


@dataclass
class _Call:
    """The first call of a module: when it began and ended, what work was done until then, and its tensors."""

    path: str
    children: bool
    begin: int
    done: int
    first: Tensor | None
    times: int = 1
    end: int = 0
    done_after: int = 0
    last: Tensor | None = None
    output: Any = None


def _watched(model: nn.Module, run: Callable[[], object]) -> list[_Call]:
    """Every module that a run calls, in the order of the calls; tensors of blocks are held until then."""
    calls: dict[str, _Call] = {}
    clock = 0
    counter = FlopCounterMode(display=False)

    def before(path: str, child: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal clock
            clock += 1
            if path in calls:
                calls[path].times += 1
                return
            first = _first((arguments, named)) if child else None
            calls[path] = _Call(path, child, clock, counter.get_total_flops(), first)

        return hook

    def after(path: str, child: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            nonlocal clock
            clock += 1
            call = calls[path]
            call.end, call.done_after = clock, counter.get_total_flops()
            if child:
                call.output, call.last = output, _first(output)

        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            child = _is_child(model, path)
            stack.callback(module.register_forward_pre_hook(before(path, child), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(path, child)).remove)
        with torch.no_grad(), counter:
            run()
    return list(calls.values())


def _is_child(model: nn.Module, path: str) -> bool:
    """Whether a module stands in a ModuleList or Sequential."""
    return bool(path) and isinstance(model.get_submodule(path.rpartition(".")[0]), CONTAINERS)


def _first(values: Any) -> Tensor | None:
    return next((value for value in tree_iter(values) if isinstance(value, Tensor)), None)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same values in the same memory."""
    if one is None or other is None:
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel() > 0)


def _chain(start: _Call, calls: list[_Call]) -> list[_Call]:
    """From one call to the outermost one that begins with its output, and so on."""
    chain = [start]
    while True:
        last = chain[-1]
        nexts = [c for c in calls if c.begin > last.end and c.end and _same(c.first, last.last)]
        if not nexts:
            return chain
        chain.append(min(nexts, key=lambda call: call.begin))


def _parts(call: _Call, calls: list[_Call]) -> list[_Call]:
    """The chain inside of a call that leads from its input to its output, or else the call itself."""
    inner = [c for c in calls if call.begin < c.begin and c.end < call.end]
    for start in inner:
        if _same(start.first, call.first):
            chain = _chain(start, inner)
            if len(chain) > 1 and _same(chain[-1].last, call.last):
                return [part for found in chain for part in _parts(found, inner)]
    return [call]


def _weights(model: nn.Module, path: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())


def _inside(model: nn.Module, chain: list[_Call], places: Mapping[str, int]) -> dict[str, int]:
    """Modules inside of a block stand at its boundary, also those that the run did not call: idle experts."""
    found = dict(places)
    for number, call in enumerate(chain):
        inner = model.get_submodule(call.path).named_modules()
        found |= {f"{call.path}.{path}" if path else call.path: number for path, _ in inner}
    return found


def _shares(chain: list[_Call], calls: list[_Call]) -> tuple[float, ...]:
    total = max(call.done_after for call in calls)
    if not total:
        return tuple(1 - number / len(chain) for number in range(len(chain) + 1))
    return (1.0, *(1 - call.done_after / total for call in chain))


def _bytes(chain: list[_Call]) -> int:
    return max(
        sum(value.nbytes for value in tree_iter(call.output) if isinstance(value, Tensor)) for call in chain
    )
