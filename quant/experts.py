"""Mixture-of-experts modules that hold the weights of all experts in one parameter per projection.

transformers 5 builds them so: `gate_up_proj` (or `up_proj`, without a gate) and `down_proj`, each either
(experts, out, in) or (experts, in, out). Which of the two is proven by the shapes of the pair where there is
a gate; without one both read alike, and the module's own `is_transposed` says it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

GATED, PLAIN = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
SORTED_CLASSES = ("Llama4TextExperts",)
"""Called with all tokens for expert 0, then all for expert 1, and so on; those not routed to it are zero."""
ROUTER_CLASS = re.compile(r"router$", re.IGNORECASE)
ROUTER_PART = re.compile(r"router|(^|_)(gate|gating|switch)$", re.IGNORECASE)


def fused_projections(module: nn.Module) -> dict[str, str]:
    """Parameter name -> key of OPS, for the fused weights of a module whose layout is certain; else empty.

    >>> module = nn.Module()
    >>> module.gate_up_proj = nn.Parameter(torch.ones(4, 6, 5))
    >>> module.down_proj = nn.Parameter(torch.ones(4, 5, 3))
    >>> fused_projections(module)
    {'gate_up_proj': 'experts', 'down_proj': 'experts'}
    """
    names, first, down = _pair(module)
    if first is None or down is None:
        return {}
    fitting = {transposed for transposed in (False, True) if _fits(first, down, names == GATED, transposed)}
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        fitting &= {declared}
    if len(fitting) != 1:
        return {}
    return dict.fromkeys(names, "experts_transposed" if fitting == {True} else "experts")


def _pair(module: nn.Module) -> tuple[tuple[str, str], Tensor | None, Tensor | None]:
    own = module._parameters
    names = GATED if GATED[0] in own else PLAIN
    found = [own.get(name) for name in names]
    usable = [None if p is None or is_lazy(p) or p.ndim != 3 else p for p in found]
    return names, usable[0], usable[1]


def _fits(first: Tensor, down: Tensor, gated: bool, transposed: bool) -> bool:
    """Whether what the first projection gives is what the second takes, and back to the first's input."""
    experts, *sides = first.shape
    wide, hidden = reversed(sides) if transposed else sides
    back = (hidden, wide // 2 if gated else wide)
    expected = tuple(reversed(back)) if transposed else back
    return tuple(down.shape) == (experts, *expected) and not (gated and wide % 2)


def experts_of(module: nn.Module) -> int:
    """How many experts a module holds: fused ones, or the entries of an nn.ModuleList; 0 for any other."""
    if fused_projections(module):
        return int(_pair(module)[1].shape[0])  # type: ignore[union-attr]
    return len(module) if isinstance(module, nn.ModuleList) else 0


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router with a weight of its own, (experts, hidden): transformers' TopKRouters."""
    weight, count = module._parameters.get("weight"), getattr(module, "num_experts", None)
    named = ROUTER_CLASS.search(type(module).__name__) is not None
    return named and weight is not None and weight.ndim == 2 and weight.shape[0] == count


def router_paths(model: nn.Module) -> frozenset[str]:
    """Paths of the modules whose outputs choose the experts: beside `experts`, one output for each."""
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = {
        path.rpartition(".")[0]: experts_of(module)
        for path, module in modules.items()
        if path.rpartition(".")[2] == "experts"
    }
    return frozenset(
        path
        for path, module in modules.items()
        if is_router(module) or (isinstance(module, nn.Linear) and _routes(path, module, blocks))
    )


def _routes(path: str, module: nn.Linear, blocks: dict[str, int]) -> bool:
    parts = path.split(".")
    for length in range(len(parts)):
        count = blocks.get(".".join(parts[:length]), 0)
        rest = parts[length:]
        if count and rest[0] != "experts" and module.out_features == count:
            return any(ROUTER_PART.search(part) for part in rest)
    return False


def routed(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The inputs of a call of fused experts: hidden states (tokens, hidden) and, (tokens, k), their experts.

    Indices outside 0 .. experts - 1 stand for no expert. None where a call cannot be read.
    """
    bound = inspect.signature(module.forward).bind(*arguments, **named).arguments
    given = [value for value in bound.values() if isinstance(value, Tensor)]
    hidden = given[0].reshape(-1, given[0].shape[-1]) if given else None
    if hidden is None:
        return None
    if type(module).__name__ in SORTED_CLASSES:
        count = experts_of(module)
        order = torch.arange(count, device=hidden.device).repeat_interleave(len(hidden) // count)
        return hidden, order.masked_fill((hidden == 0).all(dim=1), -1)[:, None]
    indices = [value for value in given[1:] if not value.is_floating_point()]
    if len(indices) != 1 or indices[0].ndim != 2 or len(indices[0]) != len(hidden):
        return None
    return hidden, indices[0]


def gives_inner_inputs(module: nn.Module) -> bool:
    """Whether what `down_proj` multiplies can be computed: the module tells how it gates."""
    return hasattr(module, "_apply_gate") or type(module).__name__ in SORTED_CLASSES


def expert_inputs(
    module: nn.Module, parameter: str, hidden: Tensor, indices: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """What each expert's part of a fused parameter multiplies in a call (see `routed`): (expert, rows).

    The inputs of the first projection are the routed tokens themselves; those of `down_proj` never leave the
    module, so they are computed again as the module does.
    """
    for expert in range(experts_of(module)):
        rows = hidden[(indices == expert).any(dim=1)]
        if len(rows):
            yield expert, _inner(module, rows, expert) if parameter == "down_proj" else rows


def _inner(module: Any, rows: Tensor, expert: int) -> Tensor:
    names, first, _ = _pair(module)
    if first is None:
        raise TypeError(f"{type(module).__name__} holds no fused experts.")
    weight, bias = first[expert], getattr(module, f"{names[0]}_bias", None)
    if fused_projections(module)[names[0]] == "experts_transposed":
        weight = weight.t()
    product = nn.functional.linear(rows, weight, None if bias is None else bias[expert])
    if names == PLAIN:
        return module.act_fn(product)  # type: ignore[no-any-return]
    if type(module).__name__ in SORTED_CLASSES:
        gate, up = product.chunk(2, dim=-1)
        return up * module.act_fn(gate)  # type: ignore[no-any-return]
    return module._apply_gate(product)  # type: ignore[no-any-return]
