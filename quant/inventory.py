"""Taking the inventory of a model: its layers, and what is left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quant.experts import experts_of, fused_projections, routed, router_paths
from quant.layers import DTYPE_BITS, EXPERT_OPS, Excluded, Inventory, Layer, Op
from quant.ops import call_macs, matrix_shape, op_of
from quant.patterns import matches, select
from quant.quantized_models import quantized_reason
from quant.roles import cross_attention_paths, output_heads, role_of
from quant.shared import Shared, Use, shared_parameters, stored_tensors

VERSION_LACKS = "this version does not offer it"


class InventoryError(ValueError):
    """A model that cannot be planned for."""


class AlreadyQuantized(InventoryError):  # noqa: N818 - says what the model is
    """A model whose weights are quantized already."""


class NothingToQuantize(InventoryError):  # noqa: N818 - says what the model is
    """A model without a layer that takes part."""


@dataclass(frozen=True)
class Places:
    """Paths of the modules whose place in the model says what they are for."""

    heads: frozenset[str]
    routers: frozenset[str]
    cross_attention: frozenset[str]


@dataclass(frozen=True, eq=False)
class Found:
    """A tensor that could be a layer: its first use by a known module type, and all other uses' paths."""

    shared: Shared
    use: Use
    op: Op
    head: bool
    router: bool
    cross: bool

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.use.layer

    @property
    def aliases(self) -> tuple[str, ...]:
        """Names of all other places that share the tensor, each once."""
        return _other_users(self.shared, self.use)

    @property
    def names(self) -> tuple[str, ...]:
        """The layer's name and its aliases."""
        return (self.name, *self.aliases)


def _other_users(shared: Shared, first: Use) -> tuple[str, ...]:
    return tuple(dict.fromkeys(use.layer for use in shared.uses if use.layer not in (first.layer, "")))


def take_inventory(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    run: Callable[[], int] | None = None,
) -> Inventory:
    """List the layers of a model, in the model's order.

    Embeddings, the output head (and tensors tied to them) and routers of experts are left out unless an
    `include` pattern matches; `exclude` wins over `include`. `run` makes one calibration forward and returns
    how many samples were in it: MACs are counted during it, and are None without it.

    Raises AlreadyQuantized, NothingToQuantize, or PatternError for a pattern that matches nothing.
    """
    reason = quantized_reason(model)
    if reason:
        raise AlreadyQuantized(
            f"Model must be at full precision. Got one that is quantized already: {reason}."
            " Start from the original checkpoint."
        )
    tensors = shared_parameters(model)
    places = Places(output_heads(model), router_paths(model), cross_attention_paths(model))
    found = [_find(shared, places) for shared in tensors]
    reasons = _reasons([item for item in found if isinstance(item, Found)], include, exclude)
    chosen = [item for item in found if isinstance(item, Found) and item.name not in reasons]
    excluded = [_excluded(item, reasons) for item in found if item is not None and item not in chosen]
    if not chosen:
        raise NothingToQuantize(_nothing(excluded))
    macs = _count_macs(chosen, run)
    layers = tuple(_layer(item, macs.get(item.name)) for item in chosen)
    stored = sum(tensor.nbytes for tensor in stored_tensors(model))
    return Inventory(
        layers=layers,
        excluded=tuple(excluded),
        total_parameters=sum(_size(shared.tensor) for shared in tensors),
        other_bytes=stored - sum(layer.stored_bytes for layer in layers),
    )


def _find(shared: Shared, places: Places) -> Found | Excluded | None:
    """A candidate layer, a weight with the reason why it is none, or None for biases, norms and the like."""
    paths = {use.path for use in shared.uses}
    for use in shared.uses:
        op = op_of(use.module, use.attribute)
        if op is not None and _is_plain(use):
            reason = _unfit(shared, use)
            if reason:
                others = _other_users(shared, use)
                return Excluded(use.layer or use.name, op, _size(shared.tensor), reason, others)
            return Found(
                shared,
                use,
                cast(Op, op),
                head=not paths.isdisjoint(places.heads),
                router=not paths.isdisjoint(places.routers),
                cross=not paths.isdisjoint(places.cross_attention),
            )
    use = shared.uses[0]
    bias = use.attribute.endswith("bias") and bool(fused_projections(use.module))
    if is_lazy(shared.tensor) or (shared.tensor.ndim >= 2 and not bias):
        kind = type(use.module).__name__
        return Excluded(use.name, kind, _size(shared.tensor), _unknown(shared.tensor, use))
    return None


def _is_plain(use: Use) -> bool:
    """Whether the module computes with the parameter itself; a weight made by a hook is another tensor."""
    return getattr(use.module, use.attribute) is use.module._parameters.get(use.attribute)


def _unfit(shared: Shared, use: Use) -> str | None:
    tensor = shared.tensor
    if is_lazy(tensor):
        return "its shape is not known before the first forward"
    if use.layer == "":
        return "the model itself is this one module; wrap it in nn.Sequential to give it a name"
    if tensor.numel() == 0:
        return "it is empty"
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in DTYPE_BITS:
        return f"its type {kind} is not one of {', '.join(DTYPE_BITS)}"
    if shared.overlaps:
        return f"it shares memory with {shared.overlaps} in another shape"
    return None


def _unknown(tensor: Tensor, use: Use) -> str:
    if is_lazy(tensor):
        return "its shape is not known before the first forward"
    if "expert" in use.name.lower() and tensor.ndim == 3:
        return f"fused expert tensor whose layout is not certain: {VERSION_LACKS}"
    if isinstance(use.module, nn.MultiheadAttention):
        return f"fused projection of nn.MultiheadAttention: {VERSION_LACKS}"
    if "parametrizations" in use.path or use.attribute in ("weight_g", "weight_v", "weight_orig"):
        return "parametrized weight: fuse the parametrization first to quantize it"
    return f"parameter of a module type ({type(use.module).__name__}) that has no layer: {VERSION_LACKS}"


def _reasons(found: list[Found], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """Layer name -> why it is left out. Patterns are matched with names and aliases."""
    names = [name for item in found for name in item.names]
    select((*include, *exclude), names)
    reasons = {}
    for item in found:
        pattern = _first_match(exclude, item.names)
        if pattern is not None:
            reasons[item.name] = f"matches the exclude pattern {pattern!r}"
            continue
        kept = _kept_by_default(item)
        if kept and _first_match(include, item.names) is None:
            tied = f" (shared with {', '.join(item.aliases)})" if item.aliases else ""
            reasons[item.name] = f"{kept}{tied}: left out by default; include it by pattern"
    return reasons


def _kept_by_default(item: Found) -> str | None:
    """What a layer is that keeps its precision unless it is asked for; None for all others."""
    if item.op == "embedding":
        return "embedding"
    if item.head:
        return "output head"
    return "router of experts" if item.router else None


def _first_match(patterns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((p for p in patterns if any(matches(p, name) for name in names)), None)


def _excluded(item: Found | Excluded, reasons: dict[str, str]) -> Excluded:
    if isinstance(item, Excluded):
        return item
    return Excluded(item.name, item.op, _size(item.shared.tensor), reasons[item.name], item.aliases)


def _nothing(excluded: list[Excluded]) -> str:
    shown = "; ".join(f"{item.name}: {item.reason}" for item in excluded[:3]) or "it has no weight matrices"
    return (
        "Model must have at least one layer to quantize (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding,"
        f" transformers' Conv1D or fused experts). Got none: {shown}. Include layers by pattern, or drop"
        " exclude patterns."
    )


def _layer(item: Found, macs: int | None) -> Layer:
    shape = tuple(item.shared.tensor.shape)
    return Layer(
        name=item.name,
        op=item.op,
        weight_shape=shape,
        matrix=matrix_shape(shape, item.op),
        parameters=item.shared.tensor.numel(),
        macs=macs,
        role=role_of(item.name, item.op, head=item.head, router=item.router, cross=item.cross),
        aliases=item.aliases,
        dtype=str(item.shared.tensor.dtype).removeprefix("torch."),
    )


def _size(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel()


def _count_macs(found: list[Found], run: Callable[[], int] | None) -> dict[str, int]:
    """Layer name -> MACs per sample, for the layers whose modules the forward called."""
    if run is None:
        return {}
    totals: dict[str, int] = {}
    with _counting(found, totals), torch.no_grad():
        samples = run()
    if samples < 1:
        raise InventoryError(
            f"Calibration forward must hold at least one sample. Got {samples}. Add calibration data."
        )
    return {name: (total + samples // 2) // samples for name, total in totals.items()}


@contextmanager
def _counting(found: list[Found], totals: dict[str, int]) -> Iterator[None]:
    """Count the MACs of every call of the layers' modules while the block runs."""
    handles = []
    for item in found:
        uses = {(id(use.module), use.attribute): use for use in item.shared.uses}
        for use in uses.values():
            op = op_of(use.module, use.attribute)
            if op is not None:
                hook = _counter(item, op, totals)
                handles.append(use.module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(item: Found, op: str, totals: dict[str, int]) -> Callable[..., None]:
    size = item.shared.tensor.numel()

    def count(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if op in EXPERT_OPS:
            macs = _expert_macs(module, size, arguments, named)
        else:
            macs = call_macs(module, op, _first_tensor((*arguments, *named.values())), output)
        if macs is not None:
            totals[item.name] = totals.get(item.name, 0) + macs

    return count


def _expert_macs(
    module: nn.Module, size: int, arguments: tuple[Any, ...], named: dict[str, Any]
) -> int | None:
    """Every token passes through the experts that it is routed to, no others; None for an unknown call."""
    call = routed(module, arguments, named)
    if call is None:
        return None
    experts = experts_of(module)
    chosen = int(((call[1] >= 0) & (call[1] < experts)).sum())
    return chosen * (size // experts)


def _first_tensor(values: tuple[Any, ...]) -> Tensor:
    return next((value for value in values if isinstance(value, Tensor)), torch.empty(0))
