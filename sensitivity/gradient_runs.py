"""How a session runs gradient passes: through the whole model, or block by block where its limit asks so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sensitivity.chain import Chain, NoChain, find_chain, graph_bytes
from sensitivity.estimators import keyed_generator
from sensitivity.memory import GradientUse, MemoryUse, Peak, anonymous_bytes, trim
from sensitivity.passes import GradientPass, run_whole
from sensitivity.streaming import room_beside, run_streamed

if TYPE_CHECKING:
    from sensitivity.session import Session

STEP = "the gradients of one sample"


class GradientRuns:
    """Gradient passes of one session. What they take is measured on one sample when it is first needed."""

    def __init__(self, session: Session, memory: MemoryUse | None) -> None:
        self._session, self._memory = session, memory

    def run(self, asked: GradientPass) -> None:
        """Fill in every place of the pass. Raises MemoryLimitTooLow."""
        if self._memory is None or not asked.layers:
            run_whole(self._session, asked)
        elif self.streamed and isinstance(self.chain, Chain):
            in_memory = self._room(self._memory, asked)
            in_files = room_beside(self._session.disk, self.chain, asked)
            run_streamed(self._session, self.chain, asked, in_memory + in_files)
        else:
            self.require_whole(asked.schemes)
            run_whole(self._session, asked)

    def require_whole(self, schemes: Sequence[str] = ()) -> None:
        """Give quantized weights what the graph of a sample through the whole model leaves of the limit.

        Raises MemoryLimitTooLow.
        """
        if self._memory is None:
            return
        weights = self._session.weights
        by_inputs = any(weights.scheme(name).needs_inputs for name in schemes)
        taken = self._without_caches(self._memory) + (self._session.bounds.moments if by_inputs else 0)
        taken += self.use.whole + self.use.step + self._memory.quantizing(by_inputs=by_inputs)
        self._memory.require(taken, STEP)
        weights.bound(self._memory.available - taken)

    @property
    def streamed(self) -> bool:
        """Whether passes go block by block: they can, and the graph of a sample does not fit."""
        return self.use.fault is None and not self._whole_fits

    @property
    def fit(self) -> bool:
        """Whether metrics of one backward pass can be measured within the limit, one way or the other."""
        return self._whole_fits or (self.use.fault is None and self._step_fits)

    @property
    def _whole_fits(self) -> bool:
        return self._memory is None or self._fits(self._memory, self.use.step + self.use.whole)

    @property
    def _step_fits(self) -> bool:
        return self._memory is None or self._fits(self._memory, self.use.step)

    @staticmethod
    def _fits(memory: MemoryUse, graph: int) -> bool:
        return memory.loaded + memory.largest + graph <= memory.available

    @cached_property
    def chain(self) -> Chain | NoChain:
        """The blocks that gradients can go through one after the other, or why there are none."""
        session = self._session
        try:
            paths = session.forwards.resuming.blocks.paths
            found = find_chain(session.model, paths, self._parameters, self._objective)
            for layer in session.inventory.layers:
                found.block_of(layer)
        except NoChain as fault:
            return fault
        return found

    @cached_property
    def use(self) -> GradientUse:
        """What a sample takes."""
        before = anonymous_bytes()
        with Peak() as peak:
            chain = self.chain
        if isinstance(chain, Chain):
            kept = sum(chain.hidden)
            return GradientUse(chain.whole_graph, peak.bytes - before, kept, len(chain.paths))
        with Peak() as peak:
            whole = graph_bytes(self._session.model, self._parameters, self._objective)
        return GradientUse(whole, peak.bytes - before, fault=str(chain))

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [self._session.weights.parameter(layer.name) for layer in self._session.inventory.layers]

    def _objective(self) -> Tensor:
        session = self._session
        outputs = session.task.outputs(session.model, session.sample("scoring", 0))
        return session.task.sampled_objective(outputs, keyed_generator((session.spec.seed, "rehearsal")))

    def _room(self, memory: MemoryUse, asked: GradientPass) -> int:
        """What such passes leave of the limit for quantized weights, which are made between graphs where at
        least one has room. Raises MemoryLimitTooLow.
        """
        weights, step = self._session.weights, self.use.step
        by_inputs = any(weights.scheme(name).needs_inputs for name in asked.schemes)
        quantizing = memory.quantizing(by_inputs=by_inputs)
        taken = self._without_caches(memory) + (self._session.bounds.moments if by_inputs else 0)
        room = memory.available - taken - max(step, quantizing)
        if room < max(weights.parameter(name).nbytes for name in asked.layers):
            memory.require(taken + step + quantizing, STEP)
            room = memory.available - taken - step - quantizing
        weights.bound(room)
        return room

    def _without_caches(self, memory: MemoryUse) -> int:
        """Drop what the session keeps; what it holds then."""
        self._session.forwards.forget()
        self._session.weights.bound(0)
        trim()
        return max(anonymous_bytes(), memory.loaded)
