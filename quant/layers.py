"""Layers: what there is to decide about in a model, and what is left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, cast, get_args

from quant.patterns import matches, select
from quant.reading import Node
from quant.storage import Matrix

Op = Literal[
    "linear", "conv1d", "conv2d", "embedding", "transformers_conv1d", "experts", "experts_transposed"
]
EXPERT_OPS = ("experts", "experts_transposed")
"""Weights of all experts of a block in one parameter, (experts, out, in) or (experts, in, out)."""
Role = Literal[
    "cross_attention",
    "self_attention",
    "feed_forward",
    "convolution",
    "embedding",
    "head",
    "router",
    "expert",
    "other",
]
FORMER_ROLES = {"attention": "self_attention"}
"""What documents of earlier versions call a role, and its name now."""
DTYPE_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}


class Decided(Protocol):
    """What a scheme looks at in a layer."""

    @property
    def op(self) -> str:
        """Kind of module."""

    @property
    def matrix(self) -> Matrix:
        """(output channels, columns)."""


@dataclass(frozen=True)
class Layer:
    """One quantizable weight tensor with its module.

    `name` is the module path of the first user of the tensor (for fused experts the parameter's own path),
    `aliases` the other paths that share it. `matrix` is (output channels, columns), as formats see the
    weight. `parameters` counts the weight's elements, without biases. `macs` are multiply-accumulates for
    one calibration sample, all users together, of fused experts only those that a token is routed to; None
    where the calibration forward never called the module.
    """

    name: str
    op: Op
    weight_shape: tuple[int, ...]
    matrix: Matrix
    parameters: int
    macs: int | None
    role: Role
    aliases: tuple[str, ...]
    dtype: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight at its own precision."""
        return self.parameters * DTYPE_BITS[self.dtype] // 8

    @property
    def names(self) -> tuple[str, ...]:
        """The layer's name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def experts(self) -> int:
        """How many experts share the tensor; 1 for a weight of its own."""
        return self.weight_shape[0] if self.op in EXPERT_OPS else 1

    def as_json(self) -> dict[str, Any]:
        """Plain values; `layer_from_json` reads them back."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Excluded:
    """A weight that keeps its precision. `name` is a module path, or a parameter's if no layer holds it;
    `aliases` are the other module paths that share the weight.
    """

    name: str
    op: str
    parameters: int
    reason: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The weight's name and its aliases."""
        return (self.name, *self.aliases)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class Inventory:
    """Everything a model stores: layers, what was left out and why, and the bytes of all the rest.

    `total_parameters` counts every parameter once. `other_bytes` are the bytes of everything that is not a
    layer's weight (excluded weights, biases, norms, stored buffers), at the precision they are stored in.
    """

    layers: tuple[Layer, ...]
    excluded: tuple[Excluded, ...]
    total_parameters: int
    other_bytes: int

    @property
    def parameters(self) -> int:
        """Parameters of the layers that take part."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        """Layers under their names and under every alias."""
        return {name: layer for layer in self.layers for name in layer.names}

    def with_roles(self, roles: Mapping[str, str]) -> Inventory:
        """The same layers with other roles, by name or pattern; of several that match the last one counts.

        Raises PatternError for a pattern that matches nothing.
        """
        select(roles, self.by_name)
        return replace(self, layers=tuple(_with_role(layer, roles) for layer in self.layers))

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Inventory.from_json` reads them back."""
        return {
            "layers": [layer.as_json() for layer in self.layers],
            "excluded": [item.as_json() for item in self.excluded],
            "total_parameters": self.total_parameters,
            "other_bytes": self.other_bytes,
        }

    @classmethod
    def from_json(cls, value: Any) -> Inventory:
        """Inverse of `as_json`. Raises ReadError that names the place."""
        fields = Node(value).fields("layers", "excluded", "total_parameters", "other_bytes")
        return cls(
            layers=tuple(layer_from_json(item) for item in fields["layers"].items()),
            excluded=tuple(_excluded(item) for item in fields["excluded"].items()),
            total_parameters=fields["total_parameters"].integer(),
            other_bytes=fields["other_bytes"].integer(),
        )


def _with_role(layer: Layer, roles: Mapping[str, str]) -> Layer:
    found = [role for key, role in roles.items() if any(matches(key, name) for name in layer.names)]
    return replace(layer, role=cast(Role, found[-1])) if found else layer


def parameter_name(layer: str, op: str) -> str:
    """The full name of the parameter of a layer.

    >>> parameter_name("mlp.up_proj", "linear"), parameter_name("mlp.experts.down_proj", "experts")
    ('mlp.up_proj.weight', 'mlp.experts.down_proj')
    """
    return layer if op in EXPERT_OPS else f"{layer}.weight"


def layer_from_json(node: Node) -> Layer:
    """Inverse of `Layer.as_json`. Raises ReadError that names the place."""
    fields = node.fields(*Layer.__dataclass_fields__)
    op, role, dtype = fields["op"].text(), fields["role"].text(), fields["dtype"].text()
    role = FORMER_ROLES.get(role, role)
    if op not in get_args(Op):
        raise fields["op"].error(f"one of {', '.join(get_args(Op))}")
    if role not in get_args(Role):
        raise fields["role"].error(f"one of {', '.join(get_args(Role))}")
    if dtype not in DTYPE_BITS:
        raise fields["dtype"].error(f"one of {', '.join(DTYPE_BITS)}")
    return Layer(
        name=fields["name"].text(),
        op=cast(Op, op),
        weight_shape=tuple(item.integer(1) for item in fields["weight_shape"].items()),
        matrix=read_matrix(fields["matrix"]),
        parameters=fields["parameters"].integer(1),
        macs=fields["macs"].optional_integer(),
        role=cast(Role, role),
        aliases=tuple(item.text() for item in fields["aliases"].items()),
        dtype=dtype,
    )


def read_matrix(node: Node) -> Matrix:
    """(output channels, columns) from an array of two integers."""
    sides = tuple(item.integer(1) for item in node.items())
    if len(sides) != 2:
        raise node.error("two integers (output channels, columns)")
    return sides[0], sides[1]


def _excluded(node: Node) -> Excluded:
    """Documents from before there were aliases have none."""
    given = ("aliases",) if "aliases" in node.mapping() else ()
    fields = node.fields("name", "op", "parameters", "reason", *given)
    return Excluded(
        name=fields["name"].text(),
        op=fields["op"].text(),
        parameters=fields["parameters"].integer(),
        reason=fields["reason"].text(),
        aliases=tuple(item.text() for item in fields["aliases"].items()) if given else (),
    )
