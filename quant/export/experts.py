"""Fused experts by the names that consumers know: one linear module per expert and projection. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.geometry import geometry_of
from quant.layers import EXPERT_OPS

PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Fused parameter -> the projections that it holds."""
BLOCKS = {
    "minimax": "block_sparse_moe",
    "minimax_m2": "block_sparse_moe",
    "mixtral": "block_sparse_moe",
    "phimoe": "block_sparse_moe",
}
"""`model_type` -> what the block of experts is called in checkpoints and runtimes, where it is not `mlp`."""


def linears(name: str, op: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The linear modules that hold a module's weight: itself, or those of every expert.

    The name itself, too, for experts whose number the configuration does not say.

    >>> linears("model.layers.0.mlp.down_proj", "linear", {})
    ('model.layers.0.mlp.down_proj',)
    """
    place, _, parameter = name.rpartition(".")
    geometry = geometry_of(config) if op in EXPERT_OPS else None
    if geometry is None or not geometry.experts or parameter not in PROJECTIONS:
        return (name,)
    block = BLOCKS.get(str(config.get("model_type")))
    if block is not None:
        place = place.removesuffix(".mlp.experts") + f".{block}.experts"
    return tuple(
        f"{place}.{expert}.{projection}"
        for expert in range(geometry.experts)
        for projection in PROJECTIONS[parameter]
    )
