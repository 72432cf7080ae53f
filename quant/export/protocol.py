"""What an exporter is given and what it answers. No torch, no consumer's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, get_args

from quant.export.experts import linears
from quant.formats import BlockFormat, FloatFormat, GgufFormat, IntegerFormat
from quant.kv_cache import FULL
from quant.layers import Inventory, Op
from quant.plan import Plan, PlanLayer
from quant.runtime_rules import OWN_TYPES
from quant.schemes import Scheme, parse_scheme

QUANTIZABLE = get_args(Op)
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
    """What a consumer is told about one module: how its weight is stored, and how its input is quantized.

    `kind` is the number type: "int", "fp8_e4m3", "fp8_e5m2", "fp4", "nf4", "mxfp4", "mxfp8", "nvfp4", a
    GGUF type ("q4_k"), "bf16" or "fp16". `symmetric` is False where a zero point or minimum is stored.
    `granularity` is "tensor", "channel", "group" (blocks of MX, NVFP4 and GGUF are groups) or "none";
    `group_size` is None without groups, `activation` the name of an activation format or None.

    >>> WeightFacts.of(parse_scheme("w4-g32-asym"))
    WeightFacts(kind='int', bits=4, symmetric=False, granularity='group', group_size=32, activation=None)
    >>> WeightFacts.of(parse_scheme("nvfp4")).group_size, WeightFacts.of(parse_scheme("fp8")).kind
    (16, 'fp8_e4m3')
    """

    kind: str
    bits: int
    symmetric: bool
    granularity: str
    group_size: int | None
    activation: str | None = None

    @classmethod
    def of(cls, scheme: Scheme) -> WeightFacts:
        """The facts of any scheme."""
        weight, activation = scheme.weight, scheme.activation
        name = None if activation is None else activation.name
        stored: tuple[str, bool, str, int | None]
        match weight:
            case IntegerFormat():
                stored = ("int", weight.symmetric, weight.granularity, weight.group_size)
            case FloatFormat():
                kind = FLOAT_KINDS.get(weight.base, weight.base)
                stored = (kind, True, weight.granularity, weight.group_size)
            case BlockFormat():
                stored = (weight.name, True, "group", weight.size)
            case GgufFormat():
                stored = (weight.name, not weight.minimum, "group", weight.size)
            case _:
                stored = (weight.name, True, "none", None)
        kind, symmetric, granularity, size = stored
        return cls(kind, weight.weight_bits, symmetric, granularity, size, name)


FLOAT_KINDS = {"fp8": "fp8_e4m3", "fp8-e5m2": "fp8_e5m2"}


ReadBack = Mapping[str, WeightFacts | None]
"""Module path -> its facts, None where the module keeps its precision."""


@dataclass(frozen=True)
class Module:
    """A module whose weight could be quantized, and the kind of operation it is (a key of OPS).

    `shape` is the weight's, None where it is not known.
    """

    name: str
    op: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model's `config.json` and every module that could be quantized, tied ones under each name.

    `digest` is that of its weights, None where it is the plan's own model.
    """

    config: Mapping[str, Any]
    modules: tuple[Module, ...]
    digest: str | None = None

    @cached_property
    def linears(self) -> dict[str, tuple[str, ...]]:
        """Module path -> what consumers know it by: one module, or one per expert and projection."""
        return {module.name: linears(module.name, module.op, self.config) for module in self.modules}

    @property
    def own_type(self) -> str | None:
        """ "bf16" or "fp16" where the configuration says that the weights have that type, else None."""
        dtype = self.config.get("dtype", self.config.get("torch_dtype"))
        return OWN_TYPES.get(str(dtype).removeprefix("torch."))

    @classmethod
    def of(cls, inventory: Inventory, config: Mapping[str, Any]) -> ModelFacts:
        """From an inventory, whatever it includes or leaves out."""
        layers = [Module(n, layer.op, layer.weight_shape) for layer in inventory.layers for n in layer.names]
        left_out = [item for item in inventory.excluded if item.op in QUANTIZABLE]
        excluded = [Module(name, item.op) for item in left_out for name in item.names]
        return cls(config, tuple(layers + excluded))


@dataclass(frozen=True)
class Deployment:
    """A plan together with the model that it is for.

    Raises ExportError where a layer of the plan is no module of the model, or one of another shape.
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
        for module in self.model.modules:
            layer = self.layers.get(module.name)
            if layer is not None and module.shape not in (None, layer.shape):
                raise ExportError(
                    f"Plan must be of the model's shapes. Got {layer.shape} for {module.name},"
                    f" which is {module.shape}. Pass the plan's own model, or one fine-tuned from it."
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
    def facts(self) -> dict[str, WeightFacts]:
        """Module path -> facts of every planned module, whether or not it keeps its precision."""
        return {name: WeightFacts.of(scheme) for name, scheme in self.schemes.items()}

    @cached_property
    def quantized(self) -> dict[str, WeightFacts]:
        """Module path -> facts of the planned modules that do not keep their precision."""
        own = self.model.own_type
        return {name: facts for name, facts in self.facts.items() if own is None or facts.kind != own}

    @cached_property
    def quantized_layers(self) -> dict[str, PlanLayer]:
        """Layers of the plan that do not keep their precision, tied ones once."""
        return {name: layer for name, layer in self.plan.layers.items() if name in self.quantized}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the layers that the plan leaves in the model's own type."""
        return sum(layer.bytes for name, layer in self.plan.layers.items() if name not in self.quantized)

    @property
    def cache(self) -> str | None:
        """The type of key-value cache that all attention layers have; None where they are full, or differ, or
        were not decided.
        """
        kinds = set((self.plan.kv_cache or {}).values())
        return next(iter(kinds)) if len(kinds) == 1 and kinds != {FULL} else None

    @cached_property
    def untouched(self) -> tuple[Module, ...]:
        """Modules that keep their precision: left out of the plan, or planned in the model's own type."""
        return tuple(module for module in self.model.modules if module.name not in self.quantized)

    @property
    def kept_names(self) -> list[str]:
        """Names of the modules that keep their precision, fused experts by those of their linear modules."""
        return [name for module in self.untouched for name in self.model.linears[module.name]]

    @cached_property
    def expected(self) -> dict[str, WeightFacts | None]:
        """What reading an export back must give: facts of quantized modules, None for all others."""
        return {**self.quantized, **{module.name: None for module in self.untouched}}


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
