"""Token ids drawn evenly from the vocabulary: the plainest input a language model takes (HIGGS uses it)."""

from __future__ import annotations

from torch import Tensor, nn

from sensitivity.calibration import vocabulary_size
from sensitivity.data_free.tokens import random_ids, require_positions
from sensitivity.errors import BadCalibration
from sensitivity.units import MakeUnit


class RandomTokens:
    """Every token at every position is equally likely; special tokens are not spared."""

    def make(self, model: nn.Module, unit: MakeUnit) -> dict[str, Tensor]:
        """`input_ids` (samples, length). Raises BadCalibration for a model without token embeddings."""
        vocabulary = vocabulary_size(model)
        if vocabulary is None:
            raise BadCalibration(
                "random_tokens needs a model with token embeddings. Got none. Use batch_norm_images for one"
                " with batch norms, or send data."
            )
        require_positions(model, unit.length)
        return {"input_ids": random_ids(vocabulary, unit, unit.length)}
