"""Gradients block by block: what flows between blocks waits in files, each block's graph is made again for
its backward pass, and a block's quantized weights are made once for all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sensitivity.blocks import replaced_forward
from sensitivity.calibration import placement
from sensitivity.chain import Call, Chain, hidden_of
from sensitivity.gradients import gradients
from sensitivity.passes import BACKWARD_FORWARDS, GradientPass, Place
from sensitivity.spill import MOST_FILES, DiskBudget

if TYPE_CHECKING:
    from sensitivity.session import Session

SMALL = 2**16
"""What blocks are given beside their input goes to files beyond this."""

Group = tuple[tuple[int, ...], range]
"""Positions of layers, and columns of schemes, whose quantized weights fit in memory together."""


def run_streamed(session: Session, chain: Chain, asked: GradientPass, weight_bytes: int) -> None:
    """As `run_whole`, bit for bit. `weight_bytes` bound the quantized weights that are held at a time."""
    together, rows = samples_together(session.disk, chain, asked), range(len(asked.samples))
    for start in range(0, len(rows), together):
        _Sweep(session, chain, asked, rows[start : start + together], weight_bytes).run()


def samples_together(disk: DiskBudget, chain: Chain, asked: GradientPass) -> int:
    """As many samples of a pass as half of the room in files holds, and as may be mapped; at least one."""
    files = len(chain.hidden) + 2 * asked.draws
    room = disk.room // 2 // max(1, _activation_bytes(chain, asked))
    return max(1, min(room, MOST_FILES // files, len(asked.samples)))


def room_beside(disk: DiskBudget, chain: Chain, asked: GradientPass) -> int:
    """What the samples that go together leave of the room in files."""
    return max(0, disk.room - samples_together(disk, chain, asked) * _activation_bytes(chain, asked))


def _activation_bytes(chain: Chain, asked: GradientPass) -> int:
    """Of one sample: what goes into blocks, and gradients in and out of one block for each draw."""
    return sum(chain.hidden) + 2 * asked.draws * max(chain.hidden)


@dataclass
class _Kept:
    """Copies of what blocks are given beside their input; what several are given is copied once."""

    disk: DiskBudget
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, values: Tensor) -> Tensor:
        if id(values) not in self.known:
            self.known[id(values)] = values, self.disk.spilled(values) if values.nbytes > SMALL else values
        return self.known[id(values)][1]


class _Recorded(Exception):  # noqa: N818 - leaves a run that has told what it was made for
    pass


@dataclass
class _Sweep:
    """Some samples of a pass: forward through the blocks, then backward.

    inputs[k][i]  what goes into block k for sample rows[i]; those of k = n come out of the last block
    calls[i][k]   how block k is called for sample rows[i]
    """

    session: Session
    chain: Chain
    asked: GradientPass
    rows: range
    weight_bytes: int
    inputs: list[list[Tensor]] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = placement(self.session.model)[0]

    def run(self) -> None:
        """Fill in every place of the samples."""
        positions, outside = self._positions()
        first = 0 if outside else min(positions)
        self._begin()
        for number in range(len(self.chain.paths)):
            self._forward(number)
        passing = self._behind()
        for number in reversed(range(first, len(self.chain.paths))):
            onward = number > first or bool(outside)
            passing = self._backward(number, positions.get(number, ()), passing, onward=onward)
        for group in self._groups(outside):
            self._around_blocks(group, passing)

    def _positions(self) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
        """Block -> positions of the layers in it, and of those outside of the blocks."""
        found: dict[int, tuple[int, ...]] = {}
        outside: tuple[int, ...] = ()
        for position, name in enumerate(self.asked.layers):
            block = self.chain.block_of(self.session.weights.layer(name))
            if block is None:
                outside = (*outside, position)
            else:
                found[block] = (*found.get(block, ()), position)
        return found, outside

    # -- forward ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """What the model computes before its first block, and how it calls each."""
        self.inputs = [[] for _ in range(len(self.chain.paths) + 1)]
        for row in self.rows:
            calls: list[Call] = []
            kept = _Kept(self.session.disk)
            recorded = self._recorded(calls, kept, self.inputs[0])
            with gradients(()), torch.no_grad(), recorded, suppress(_Recorded):
                self._outputs(row)
            self.calls.append(calls)
            self.session.spend(1)

    @contextmanager
    def _recorded(self, calls: list[Call], kept: _Kept, first: list[Tensor]) -> Iterator[None]:
        def record(number: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **named: Any) -> Any:
                slot = self.chain.slots[number]
                hidden = arguments[slot] if isinstance(slot, int) else named[slot]
                if number == 0:
                    first.append(self._spilled(hidden))
                calls.append(Call.of(arguments, named, slot).mapped(kept))
                if number == len(self.chain.paths) - 1:
                    raise _Recorded
                return self.chain.output(number, hidden)

            return forward

        with self._instead(record):
            yield

    def _forward(self, number: int) -> None:
        for index in range(len(self.rows)):
            with gradients(()), torch.no_grad():
                self.inputs[number + 1].append(
                    self._spilled(self._block(number, index, self.inputs[number][index]))
                )

    def _block(self, number: int, index: int, hidden: Tensor) -> Tensor:
        """What a block makes of an input, which it may overwrite a copy of."""
        block = self.session.model.get_submodule(self.chain.paths[number])
        call = self.calls[index][number].mapped(lambda values: values.to(self.device))
        arguments, named = call.given(self._copy(hidden))
        return hidden_of(block(*arguments, **named))

    # -- backward ---------------------------------------------------------------------------------

    def _behind(self) -> list[list[Tensor]]:
        """Per sample and draw, the gradient in the last block's output."""
        found = []
        for index, row in enumerate(self.rows):
            last = self.inputs[-1][index].requires_grad_()
            with gradients(()), self._skipped(last):
                outputs = self._outputs(row)
                batch = self._batch(row)
                own = []
                for draw in range(self.asked.draws):
                    objective = self.asked.finite_objective(outputs, batch, row, draw)
                    again = draw < self.asked.draws - 1
                    own.append(self._spilled(torch.autograd.grad(objective, last, retain_graph=again)[0]))
            last.requires_grad_(False)
            found.append(own)
        return found

    def _backward(
        self, number: int, positions: tuple[int, ...], passing: list[list[Tensor]], *, onward: bool
    ) -> list[list[Tensor]]:
        """Gradients in a block's input, and those of its layers into their places."""
        found: list[list[Tensor]] = [[] for _ in self.rows]
        for turn, group in enumerate(self._groups(positions) or [((), range(0))]):
            wanted = onward and turn == 0
            self._quantize(group)
            for index, row in enumerate(self.rows):
                entry = self.inputs[number][index].detach().requires_grad_(wanted)
                with self._taking(group, row) as draw:
                    output = self._block(number, index, entry)
                    for draw[0], waiting in enumerate(passing[index]):
                        gradient = waiting.to(self.device)
                        last = draw[0] == self.asked.draws - 1
                        if output.requires_grad:
                            output.backward(gradient, retain_graph=not last)  # type: ignore[no-untyped-call]
                        if wanted:
                            own = torch.zeros_like(entry) if entry.grad is None else entry.grad
                            found[index].append(self._spilled(own))
                            entry.grad = None
            self._spend_on_block(len(self.rows))
        return found

    def _spend_on_block(self, samples: int) -> None:
        """A block forward and backward for so many samples, as its part of a pass."""
        work = 1 + BACKWARD_FORWARDS * self.asked.draws
        self.session.spend(samples * work / len(self.chain.paths))

    def _around_blocks(self, group: Group, passing: list[list[Tensor]]) -> None:
        """Layers before and behind the blocks, both in one backward pass: they may share a tensor."""
        self._quantize(group)
        for index, row in enumerate(self.rows):
            first: list[Tensor] = []
            last = self.inputs[-1][index]
            with self._taking(group, row) as draw, self._skipped(last, first):
                outputs, batch = self._outputs(row), self._batch(row)
                for draw[0], gradient in enumerate(passing[index]):
                    objective = self.asked.finite_objective(outputs, batch, row, draw[0])
                    ends = {objective: torch.ones_like(objective), first[0]: gradient.to(self.device)}
                    own = {end: given for end, given in ends.items() if end.requires_grad}
                    if own:
                        again = draw[0] < self.asked.draws - 1
                        torch.autograd.backward([*own], [*own.values()], retain_graph=again)

    @contextmanager
    def _taking(self, group: Group, row: int) -> Iterator[list[int]]:
        """Gradients of the group's layers go where they belong; the draw is to be set in what is given."""
        positions, columns = group
        draw = [0]

        def contract(index: int, gradient: Tensor) -> None:
            self.asked.take(Place(row, draw[0], positions[index], columns), gradient)

        parameters = [self.session.weights.parameter(self.asked.layers[p]) for p in positions]
        with gradients(parameters, contract), self.asked.around(row, positions, columns):
            yield draw

    def _quantize(self, group: Group) -> None:
        """Have the group's weights at hand, if there is room for any: what that takes is not needed while a
        graph is held.
        """
        layers = [self.asked.layers[position] for position in group[0]]
        for layer in layers if self._fits(layers) else ():
            for column in group[1]:
                self.session.weights.quantized(layer, self.asked.schemes[column])

    def _fits(self, layers: Sequence[str]) -> bool:
        return all(self.session.weights.parameter(layer).nbytes <= self.weight_bytes for layer in layers)

    def _groups(self, positions: tuple[int, ...]) -> list[Group]:
        """Layers in order, as many as fit with all their schemes; of one that does not fit, parts of them."""
        groups: list[Group] = []
        size = 0
        columns = range(len(self.asked.schemes))
        for position in positions:
            bytes_each = self.session.weights.parameter(self.asked.layers[position]).nbytes
            own = bytes_each * len(columns)
            if own > self.weight_bytes:
                step = max(1, self.weight_bytes // bytes_each)
                groups += [((position,), columns[a : a + step]) for a in range(0, len(columns), step)]
                size = self.weight_bytes
            elif groups and size + own <= self.weight_bytes:
                groups[-1] = ((*groups[-1][0], position), columns)
                size += own
            else:
                groups.append(((position,), columns))
                size = own
        return groups

    def _spilled(self, values: Tensor) -> Tensor:
        return self.session.disk.spilled(values)

    def _copy(self, waiting: Tensor) -> Tensor:
        """What waits in a file, on the model's device, to be overwritten."""
        return waiting.to(self.device, copy=True)

    # -- runs outside of the blocks ---------------------------------------------------------------

    def _outputs(self, row: int) -> Any:
        return self.session.task.outputs(self.session.model, self._batch(row))

    def _batch(self, row: int) -> Any:
        return self.session.sample("scoring", self.asked.samples[row])

    def _skipped(self, output: Tensor, first: list[Tensor] | None = None) -> AbstractContextManager[None]:
        """Blocks compute nothing: the last gives a copy of `output`; `first` gets the first one's input."""

        def skip(number: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **named: Any) -> Any:
                slot = self.chain.slots[number]
                hidden = arguments[slot] if isinstance(slot, int) else named[slot]
                if number == 0 and first is not None:
                    first.append(hidden)
                last = number == len(self.chain.paths) - 1
                return self.chain.output(number, self._copy(output) if last else hidden)

            return forward

        return self._instead(skip)

    @contextmanager
    def _instead(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for number, block in enumerate(self.chain.blocks(self.session.model)):
                stack.enter_context(replaced_forward(block, forward(number)))
            yield
