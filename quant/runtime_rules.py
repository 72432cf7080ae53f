"""What a runtime's rules are made of: formats per operation, shapes, and sets of layers that must agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quant.integer import IntegerFormat, ScaleType
from quant.kv_cache import FULL, SMALLER_TYPES
from quant.layers import EXPERT_OPS, Layer
from quant.patterns import matches
from quant.plan import PlanLayer
from quant.schemes import Scheme
from quant.storage import Format, Matrix

OWN_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
"""Type of stored weights -> the format that leaves them as they are."""
HELD_SCALES: dict[str | None, tuple[ScaleType, ...]] = {"float16": ("float16",), "bfloat16": ("bfloat16",)}
"""Type of stored weights -> the types of scales that it holds exactly; other types hold all."""
HEADS = ("lm_head", "embed_out", "classifier", "score")
"""Last parts of module paths that name an output head, where a document does not say what a layer is."""


@dataclass(frozen=True)
class Target:
    """What a rule sees of a layer; the matrix of fused experts is that of one expert, as kernels see it.

    `dtype` is the type that the model stores the weight in, None where that is not known.
    """

    name: str
    op: str
    matrix: Matrix
    embedding: bool
    head: bool
    dtype: str | None = None


def target_of(layer: Layer) -> Target:
    """The target of an inventory's layer; a tensor shared by embedding and head is both."""
    head = layer.role == "head" or _named_head(layer.aliases)
    matrix = (layer.matrix[0] // layer.experts, layer.matrix[1])
    return Target(layer.name, layer.op, matrix, layer.op == "embedding", head, layer.dtype)


def planned_target(name: str, layer: PlanLayer) -> Target:
    """The target of a plan's layer; heads are told by name."""
    experts = layer.shape[0] if layer.op in EXPERT_OPS else 1
    matrix = (layer.matrix[0] // experts, layer.matrix[1])
    head = _named_head((name, *layer.aliases))
    return Target(name, layer.op, matrix, layer.op == "embedding", head, layer.dtype)


def _named_head(names: Iterable[str]) -> bool:
    return any(name.rsplit(".", 1)[-1] in HEADS for name in names)


@dataclass(frozen=True)
class Integers:
    """Integer formats that a kernel takes. Empty `groups` means any of 2 columns or more.

    >>> Integers((4, 8), groups=(32, 128)).text
    'w4, w8 per channel or in groups of 32, 128, symmetric'
    """

    bits: tuple[int, ...]
    channel: bool = True
    groups: tuple[int, ...] | None = None
    symmetric: tuple[bool, ...] = (True,)
    scale_types: tuple[ScaleType, ...] = ("float16", "bfloat16")

    def takes(self, fmt: Format) -> bool:
        """Whether the kernel takes a format."""
        return (
            isinstance(fmt, IntegerFormat)
            and fmt.bits in self.bits
            and fmt.symmetric in self.symmetric
            and fmt.scale_type in self.scale_types
            and self._granular(fmt)
        )

    def _granular(self, fmt: IntegerFormat) -> bool:
        if fmt.granularity != "group":
            return self.channel and fmt.granularity == "channel"
        if self.groups is None or fmt.group_size is None:
            return False
        return fmt.group_size in self.groups if self.groups else fmt.group_size > 1

    @property
    def text(self) -> str:
        """For messages."""
        widths = ", ".join(f"w{bits}" for bits in self.bits)
        parts = ["per channel"] if self.channel else []
        if self.groups is not None:
            parts.append(f"in groups of {', '.join(map(str, self.groups)) or '2 or more'}")
        signs = " or ".join("symmetric" if sign else "asymmetric" for sign in self.symmetric)
        return f"{widths} {' or '.join(parts)}, {signs}"


@dataclass(frozen=True)
class Named:
    """Formats by patterns over their short names: valid whether or not a format of that name is offered."""

    patterns: tuple[str, ...]

    def takes(self, fmt: Format) -> bool:
        """Whether a pattern matches the format's short name."""
        return any(matches(pattern, fmt.short) for pattern in self.patterns)

    @property
    def text(self) -> str:
        """For messages."""
        return ", ".join(self.patterns)


@dataclass(frozen=True)
class Rule:
    """Formats that a runtime runs for some operations, and the shapes its kernel needs.

    `columns` and `rows` must divide the matrix's columns and output channels; with `whole_groups` the group
    size must divide the columns too. `activations` are patterns over the names of activation formats;
    activations at full precision are always taken. `additions` are patterns over the names of quantizers
    whose tensors beside the format's the runtime loads too. With `own_type` the format must be the type that
    the model stores the weight in, with `own_scales` that type must hold the scales exactly.
    """

    formats: Integers | Named
    ops: tuple[str, ...] = ("linear",)
    rows: int = 1
    columns: int = 1
    whole_groups: bool = False
    activations: tuple[str, ...] = ()
    additions: tuple[str, ...] = ()
    own_type: bool = False
    own_scales: bool = False

    def takes(self, scheme: Scheme) -> bool:
        """Whether the rule is about this scheme."""
        activation = scheme.activation
        quiet = activation is None or any(matches(p, activation.name) for p in self.activations)
        return quiet and not self.lacks(scheme) and self.formats.takes(scheme.weight)

    @property
    def text(self) -> str:
        """For messages."""
        names = " or ".join(self.activations)
        return self.formats.text + (f" (activations at full precision or {names})" if names else "")

    def lacks(self, scheme: Scheme) -> bool:
        """Whether the scheme stores tensors beside the format's that the runtime does not load."""
        return scheme.adds and not any(matches(p, scheme.quantizer) for p in self.additions)

    def fault(self, target: Target, scheme: Scheme) -> str | None:
        """Why the kernel does not run a layer in a scheme that the rule is about, or None."""
        return self._type_fault(target.dtype, scheme) or self._shape_fault(target.matrix, scheme)

    def _type_fault(self, dtype: str | None, scheme: Scheme) -> str | None:
        if dtype is None:
            return None
        if self.own_type and OWN_TYPES.get(dtype) != scheme.weight.short:
            return f"16-bit weights must have the model's own type, which is {dtype}"
        scales, held = getattr(scheme.weight, "scale_type", None), HELD_SCALES.get(dtype)
        if self.own_scales and held is not None and scales not in held:
            return f"scales are loaded in the model's type, so they must be {' or '.join(held)}, not {scales}"
        return None

    def _shape_fault(self, matrix: Matrix, scheme: Scheme) -> str | None:
        rows, columns = matrix
        if rows % self.rows:
            return f"output channels must be a multiple of {self.rows}, not {rows}"
        if columns % self.columns:
            return f"columns must be a multiple of {self.columns}, not {columns}"
        size = getattr(scheme.weight, "group_size", None)
        if self.whole_groups and size is not None and columns % size:
            return f"columns must be a multiple of the group size {size}, not {columns}"
        return None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for catalogs."""
        return {
            "formats": self.formats.text,
            "ops": list(self.ops),
            "rows_multiple_of": self.rows,
            "columns_multiple_of": self.columns,
            "whole_groups": self.whole_groups,
            "activations": list(self.activations),
            "additions": list(self.additions),
            "own_type": self.own_type,
            "own_scales": self.own_scales,
        }


@dataclass(frozen=True)
class Fused:
    """Modules that a runtime stores as one: they must get one scheme.

    A member is the end of a module path, part by part, with `*` for any one part; what stands before it
    says which modules belong together.

    >>> Fused(("q_proj", "k_proj")).place("layers.0.attn.k_proj")
    'layers.0.attn'
    >>> Fused(("experts.*.w1",)).place("layers.3.experts.7.w1")
    'layers.3'
    """

    members: tuple[str, ...]

    def place(self, name: str) -> str | None:
        """What stands before the member that `name` ends with; None if it is no member."""
        parts = name.split(".")
        for member in self.members:
            wanted = member.split(".")
            tail = parts[-len(wanted) :]
            if len(tail) == len(wanted) and all(w in ("*", t) for w, t in zip(wanted, tail, strict=True)):
                return ".".join(parts[: -len(wanted)])
        return None

    def sets(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The names that belong together, two or more each, in the order they come."""
        places: dict[str, list[str]] = {}
        for name in names:
            place = self.place(name)
            if place is not None:
                places.setdefault(place, []).append(name)
        return tuple(tuple(members) for members in places.values() if len(members) > 1)


@dataclass(frozen=True)
class Runtime:
    """A runtime as data: what it can load and run.

    `kv_cache` are the types it keeps keys and values in, one for all layers if `one_cache`; `menu` are the
    schemes that a search for it tries unless it names others. `without` are patterns over the names of layers
    that it has no tensor for.
    """

    name: str
    summary: str
    source: str
    rules: tuple[Rule, ...]
    fused: tuple[Fused, ...] = ()
    embeddings: bool = False
    heads: bool = False
    kv_cache: tuple[str, ...] = ("float16", "bfloat16")
    one_cache: bool = True
    menu: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def refuses(self, target: Target, scheme: Scheme) -> str | None:
        """The rule that a scheme breaks on a layer, in words; None when the runtime runs it."""
        offered = [rule for rule in self.rules if target.op in rule.ops]
        if not offered:
            return f"{target.op} layers keep their precision"
        left_alone = self._left_alone(target)
        if left_alone is not None:
            return left_alone
        fitting = [rule for rule in offered if rule.takes(scheme)]
        if not fitting and all(rule.lacks(scheme) for rule in offered):
            return f"{target.op} layers take no tensors beside the format's, which {scheme.quantizer} stores"
        if not fitting:
            menu = "; ".join(rule.text for rule in offered)
            return f"{target.op} layers take {menu}; not {scheme.name}"
        faults = [rule.fault(target, scheme) for rule in fitting]
        return None if None in faults else f"{scheme.name}: {faults[0]}"

    @property
    def smaller_caches(self) -> tuple[str, ...]:
        """The types of `kv_cache` that a menu may hold."""
        return tuple(kind for kind in self.kv_cache if kind in SMALLER_TYPES)

    def keeps(self, kind: str) -> bool:
        """Whether a cache may have this type; full ones always may."""
        return kind == FULL or kind in self.kv_cache

    def _left_alone(self, target: Target) -> str | None:
        if any(matches(pattern, target.name) for pattern in self.without):
            return f"{self.name} does without this layer"
        if target.embedding and not self.embeddings:
            return "embeddings keep their precision"
        if target.head and not self.heads:
            return "output heads keep their precision"
        return None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for catalogs."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "rules": [rule.as_json() for rule in self.rules],
            "fused": [list(fused.members) for fused in self.fused],
            "embeddings": self.embeddings,
            "heads": self.heads,
            "kv_cache": list(self.kv_cache),
            "one_cache": self.one_cache,
            "default_schemes": list(self.menu),
            "without": list(self.without),
        }
