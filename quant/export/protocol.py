"""What an exporter is given and what it answers. No torch, no consumer's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from quant.integer import IntegerFormat
from quant.layers import Inventory
from quant.plan import Plan, PlanLayer
from quant.schemes import Scheme, parse_scheme

QUANTIZABLE = ("linear", "conv1d", "conv2d", "embedding", "transformers_conv1d")
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Violation:
    """Why a consumer cannot run a plan: the layer, the consumer's rule, and what the plan has there."""

    layer: str
    rule: str
    got: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.rule}. Got {self.got}."


class ExportError(ValueError):
    """A plan that cannot be exported."""


class ExportRefused(ExportError):  # noqa: N818 - says what happened
    """The consumer cannot express or run the plan; `violations` say where and why."""

    def __init__(self, consumer: str, violations: Sequence[Violation]) -> None:
        shown = " ".join(map(str, violations[:3]))
        more = f" ({len(violations)} violations in all.)" if len(violations) > 3 else ""
        super().__init__(
            f"Plan must be one that {consumer} can run. {shown}{more} Solve again with schemes and ties that"
            " obey these rules."
        )
        self.violations = tuple(violations)


@dataclass(frozen=True)
class WeightFacts:
    """What a consumer is told about one module's weight. `group_size` is None without groups.

    >>> WeightFacts.of(parse_scheme("w4-g32-asym"))
    WeightFacts(bits=4, symmetric=False, granularity='group', group_size=32)
    """

    bits: int
    symmetric: bool
    granularity: str
    group_size: int | None

    @classmethod
    def of(cls, scheme: Scheme) -> WeightFacts | None:
        """The facts of an integer scheme; None for a scheme that is more than integers with scales."""
        weight = scheme.weight
        if not isinstance(weight, IntegerFormat) or scheme.activation is not None or scheme.adds:
            return None
        return cls(weight.bits, weight.symmetric, weight.granularity, weight.group_size)


ReadBack = Mapping[str, WeightFacts | None]
"""Module path -> its facts, None where the module keeps its precision."""


@dataclass(frozen=True)
class Module:
    """A module whose weight could be quantized, and the kind of operation it is (a key of OPS)."""

    name: str
    op: str


@dataclass(frozen=True)
class ModelFacts:
    """A model's `config.json` and every module that could be quantized, tied ones under each name."""

    config: Mapping[str, Any]
    modules: tuple[Module, ...]

    @classmethod
    def of(cls, inventory: Inventory, config: Mapping[str, Any]) -> ModelFacts:
        """From an inventory, whatever it includes or leaves out."""
        layers = [Module(name, layer.op) for layer in inventory.layers for name in layer.names]
        excluded = [Module(item.name, item.op) for item in inventory.excluded if item.op in QUANTIZABLE]
        return cls(config, tuple(layers + excluded))


@dataclass(frozen=True)
class Deployment:
    """A plan together with the model that it is for.

    Raises ExportError where a layer of the plan is no module of the model.
    """

    plan: Plan
    model: ModelFacts

    def __post_init__(self) -> None:
        known = {module.name for module in self.model.modules}
        missing = [name for name in self.layers if name not in known]
        if missing:
            raise ExportError(
                f"Plan must name modules of the model. Got {', '.join(missing[:3])} ({len(missing)} unknown)."
                " Pass the plan's own model."
            )

    @cached_property
    def layers(self) -> dict[str, PlanLayer]:
        """Module path -> decision, tied modules under each of their names."""
        return {path: layer for name, layer in self.plan.layers.items() for path in (name, *layer.aliases)}

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Module path -> scheme."""
        read = {layer.spelled: parse_scheme(layer.spelled) for layer in self.plan.layers.values()}
        return {name: read[layer.spelled] for name, layer in self.layers.items()}

    @cached_property
    def facts(self) -> dict[str, WeightFacts | None]:
        """Module path -> facts, None where the scheme is more than integers with scales."""
        return {name: WeightFacts.of(scheme) for name, scheme in self.schemes.items()}

    @cached_property
    def untouched(self) -> tuple[Module, ...]:
        """Modules that keep their precision."""
        return tuple(module for module in self.model.modules if module.name not in self.layers)

    @cached_property
    def expected(self) -> dict[str, WeightFacts | None]:
        """What reading an export back must give: facts for planned modules, None for all others."""
        return {**self.facts, **{module.name: None for module in self.untouched}}


class ExporterModule(Protocol):
    """The functions of an exporter's module."""

    def lint(self, deployment: Deployment) -> tuple[Violation, ...]:
        """Every violation of the consumer's rules; empty when the plan can be expressed and run."""

    def files(self, deployment: Deployment) -> dict[str, bytes]:
        """File name -> content of a plan without violations."""

    def stored_bytes(self, deployment: Deployment) -> int:
        """What the consumer stores for the planned weights, its own padding and zero points counted."""

    def read_back(self, files: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
        """What the consumer's own parser takes from the files, for every quantizable module."""
