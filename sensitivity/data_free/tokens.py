"""What the makers of token data share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sensitivity.errors import BadCalibration
from sensitivity.estimators import keyed_generator
from sensitivity.units import MakeUnit


def random_ids(vocabulary: int, unit: MakeUnit, length: int) -> Tensor:
    """Ids (samples, length), each sample a function of the seed and its number alone."""
    rows = [
        keyed_generator((unit.seed, "random_tokens", number)).integers(0, vocabulary, length)
        for number in range(unit.start, unit.stop)
    ]
    return torch.stack([torch.from_numpy(row) for row in rows])


def require_positions(model: nn.Module, length: int) -> None:
    """Raises BadCalibration for sequences that are longer than the model's positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise BadCalibration(
            f"sequences must have at most the model's {positions} positions. Got {length}. Shorten them."
        )
