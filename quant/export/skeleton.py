"""A model's module tree with its names and kinds but without its weights, for consumers' parsers."""

from __future__ import annotations

import torch
from torch import nn

from quant.export.protocol import ModelFacts

SIDE = 1024
"""Sides of the stand-in weights: a multiple of every group size that a consumer offers."""


def build_skeleton(model: ModelFacts, rows: int = SIDE) -> nn.Module:
    """Modules at their paths, on the meta device; weights of stand-in sizes with `rows` output channels."""
    root = nn.Module()
    for module in model.modules:
        place = root
        *parents, last = module.name.split(".")
        for part in parents:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, _stand_in(module.op, rows))
    return root


def _stand_in(op: str, rows: int) -> nn.Module:
    with torch.device("meta"):
        match op:
            case "linear":
                return nn.Linear(SIDE, rows, bias=False)
            case "embedding":
                return nn.Embedding(rows, SIDE)
            case "conv1d":
                return nn.Conv1d(SIDE, rows, 1)
            case "conv2d":
                return nn.Conv2d(SIDE, rows, 1)
        return nn.Module()
