"""What a checkpoint writer is given and what it answers with. No torch.

A deployment (a plan and the modules of its model) says what each layer becomes, a source (a model folder)
holds the weights. A writer lints the first, lays out the files of both, and writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quant.export.protocol import Deployment, Violation

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf
    from quant.checkpoints.source import Source

PLAN_FILE = "bitplan_plan.json"
PROVENANCE_FILE = "bitplan_provenance.json"
Wrote = Callable[[str], None]
"""Told the name of each layer of the plan whose tensors have been written."""


class CheckpointError(ValueError):
    """A plan that does not fit a model folder, or an output that is in use."""


@dataclass(frozen=True)
class OutputFile:
    """One file of a checkpoint, before it is written.

    `bytes` is its size. `payload_bytes` are those of tensors alone: without header, padding and metadata; 0
    for a file without tensors.
    """

    name: str
    bytes: int
    payload_bytes: int = 0


@dataclass(frozen=True)
class Layout:
    """Exactly what will be written. `planned_bytes` of the payload store the weights of the plan's layers."""

    files: tuple[OutputFile, ...]
    planned_bytes: int

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def payload_bytes(self) -> int:
        """Of all tensors in all files."""
        return sum(file.payload_bytes for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """Plain values, the sums included."""
        return {
            "files": [asdict(file) for file in self.files],
            "bytes": self.bytes,
            "payload_bytes": self.payload_bytes,
            "planned_bytes": self.planned_bytes,
        }


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint was made from.

    `model` is the digest of the weights that were used; `planned_for`, `calibration` and `scores` are the
    plan's digests. `mismatches` say in words what was overridden: another model of the same shapes (a
    fine-tune, say) or other versions of quantizers; `forced` says that there were some. `tensors` counts the
    stored tensors that the plan changed. `activations` names the format of each layer whose inputs the plan
    rounds, `kv_cache` the type of each attention layer's cache where the plan decides these: weights alone do
    not say so, and whoever loads only them leaves both as they are.
    """

    schema: str
    consumer: str
    plan: str
    model: str
    planned_for: str | None
    calibration: str | None
    scores: str | None
    tensors: int
    activations: Mapping[str, str]
    forced: bool
    mismatches: tuple[str, ...]
    kv_cache: Mapping[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values. `kv_cache` is left out where the plan decides no caches."""
        return {name: value for name, value in asdict(self).items() if name != "kv_cache" or value}


class CheckpointModule(Protocol):
    """The functions of a writer's module. It loads without torch and without its library."""

    def lint(self, deployment: Deployment) -> tuple[Violation, ...]:
        """Every violation of the consumer's rules; empty when a checkpoint can be written and run."""

    def layout(self, source: Source, deployment: Deployment) -> Layout:
        """The files of a plan without violations, from headers and shapes alone: the dry run.

        Raises CheckpointError where the source does not hold the plan's layers.
        """

    def write(
        self, source: Source, deployment: Deployment, out: Path, inputs: InputsOf | None, wrote: Wrote
    ) -> None:
        """Write the files of `layout` into the empty folder `out`, or the one file `out`.

        One tensor is in memory at a time; `wrote` hears of each layer. `inputs` give statistics for
        quantizers that need them. Whoever calls makes the result appear whole or not at all.
        """

    def read_back(self, place: Path, deployment: Deployment) -> Iterator[tuple[str, Tensor]]:
        """(layer of the plan, its dequantized weight) for every stored one, read by the consumer's library.

        In the shape of the layer. Equal to what was measured, before that is rounded to the model's type.
        """
