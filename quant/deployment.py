"""What serving a plan uses up: whole checkpoint, key-value cache, memory, bytes read per decoding step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from quant.costs import Cell, CostError, Grid
from quant.geometry import CACHE_BITS, Geometry
from quant.kv_cache import FULL_TYPES, Caches, extended
from quant.layers import DTYPE_BITS, Inventory, Layer
from quant.schemes import Scheme

EXPERT_PART = "experts"


@dataclass(frozen=True)
class Deployment:
    """How a model is served: tokens in each cache, sequences at a time, and the type of the cache."""

    context_length: int = 4096
    batch: int = 1
    kv_cache: str = "float16"

    def __post_init__(self) -> None:
        if self.kv_cache not in CACHE_BITS:
            raise CostError(
                f"A key-value cache must be one of {', '.join(CACHE_BITS)}. Got {self.kv_cache!r}."
                " Use float16."
            )


def deployment_resources(
    inventory: Inventory,
    schemes: Sequence[Scheme],
    deployment: Deployment,
    geometry: Geometry | None,
    caches: Caches | None = None,
) -> dict[str, Grid]:
    """Layers x schemes grids; None where a format refuses the layer.

    "checkpoint_bytes" are all stored bytes of the model, "kv_cache_bytes" the cache of the deployment,
    "memory_bytes" both together, "active_bytes" what one decoding step of `batch` tokens reads: the weights
    that take part (the expected share of the experts, one row per token of an embedding) and the cache.
    What no choice changes is counted in the first layer, so that sums over layers are the whole. Where
    `caches` are decided, their layers and schemes come after those of the weights, each with its own cache.
    """
    if geometry is None:
        raise CostError(
            "A deployment must be of a model whose configuration names its attention layers. Got none of "
            "num_hidden_layers, num_attention_heads. Leave the deployment out."
        )
    stored = tuple(tuple(_bytes(layer, scheme) for scheme in schemes) for layer in inventory.layers)
    context, batch, kind = deployment.context_length, deployment.batch, deployment.kv_cache
    cache = 0 if caches is not None else geometry.cache_bytes(context, batch, kind)
    shares = [
        _active(layer, row, deployment, geometry) for layer, row in zip(inventory.layers, stored, strict=True)
    ]
    idle = _idle_bytes(inventory, deployment, geometry)
    weights = {
        "checkpoint_bytes": _with_constant(stored, inventory.other_bytes),
        "kv_cache_bytes": _with_constant(_zeros(stored), cache),
        "memory_bytes": _with_constant(stored, inventory.other_bytes + cache),
        "active_bytes": _with_constant(shares, inventory.other_bytes - idle + cache),
    }
    if caches is None:
        return weights
    _require_full(kind)
    sizes = caches.bytes(geometry, context, batch, kind)
    return {
        name: extended(grid, caches.nothing if name == "checkpoint_bytes" else sizes)
        for name, grid in weights.items()
    }


def _require_full(kind: str) -> None:
    if kind not in FULL_TYPES:
        raise CostError(
            f"A cache that a menu leaves full must be one of {', '.join(FULL_TYPES)}. Got {kind!r} as the"
            " deployment's kv_cache. Put it into the menu, and leave the deployment's out."
        )


def _bytes(layer: Layer, scheme: Scheme) -> int | None:
    refused = scheme.refuses(layer)
    return None if refused else scheme.storage(layer.matrix).bytes


def _zeros(grid: Sequence[tuple[Cell, ...]]) -> Grid:
    return tuple(tuple(None if cell is None else 0 for cell in row) for row in grid)


def _with_constant(grid: Sequence[tuple[Cell, ...]], constant: int) -> Grid:
    first = tuple(None if cell is None else cell + constant for cell in grid[0])
    return (first, *grid[1:])


def _active(
    layer: Layer, row: tuple[int | None, ...], deployment: Deployment, geometry: Geometry
) -> tuple[Cell, ...]:
    share = 1.0
    if EXPERT_PART in layer.name.split("."):
        share = float(geometry.expert_share(deployment.batch))
    elif layer.op == "embedding" and not layer.aliases:
        share = min(deployment.batch, layer.matrix[0]) / layer.matrix[0]
    return tuple(None if cell is None else ceil(cell * share) for cell in row)


def _idle_bytes(inventory: Inventory, deployment: Deployment, geometry: Geometry) -> int:
    """Bytes at full precision that a step does not read: rows of embeddings (a tied one is read as the head)
    and experts that no token is routed to.
    """
    width = DTYPE_BITS[inventory.layers[0].dtype] // 8
    experts = sum(item.parameters for item in inventory.excluded if EXPERT_PART in item.name.split("."))
    idle = int(experts * (1 - geometry.expert_share(deployment.batch)))
    if not geometry.tied_embeddings:
        tables = [item.parameters for item in inventory.excluded if item.op == "embedding"]
        idle += sum(max(0, size - deployment.batch * geometry.hidden) for size in tables)
    return width * idle
