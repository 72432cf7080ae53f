"""Sequences that the model writes itself from a random first token (LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.calibration import placement, vocabulary_size
from sensitivity.data_free.tokens import random_ids, require_positions
from sensitivity.errors import BadCalibration
from sensitivity.estimators import keyed_generator
from sensitivity.units import MakeUnit


class GeneratedTokens:
    """Every token but the first is drawn from the model's own distribution, at temperature 1 and whole."""

    def make(self, model: nn.Module, unit: MakeUnit) -> dict[str, Tensor]:
        """`input_ids` (samples, length). Raises BadCalibration for a model that does not generate."""
        vocabulary, writer = vocabulary_size(model), _writer(model)
        if vocabulary is None or writer is None:
            raise BadCalibration(
                "generated_tokens needs a language model that generates. Got one that does not. Use"
                " random_tokens, or send data."
            )
        require_positions(model, unit.length)
        device = placement(model)[0]
        first = random_ids(vocabulary, unit, 1).to(device)
        with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(unit))
            written = writer.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                min_new_tokens=unit.length - 1,
                max_new_tokens=unit.length - 1,
                use_cache=True,
            )
        return {"input_ids": written.cpu()}


def _writer(model: Any) -> Any:
    can = getattr(model, "can_generate", None)
    return model if callable(can) and can() else None


def _seed(unit: MakeUnit) -> int:
    return int(keyed_generator((unit.seed, "generated_tokens", unit.start)).integers(2**63 - 1))
