"""Causal language models: next-token distributions, averaged over each sample's real tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sensitivity.errors import BadCalibration, BadModel
from sensitivity.tasks import softmax
from sensitivity.tasks.task import Batch, Outputs, PerSample, at_least_float32, first_tensor

IGNORED = -100


class CausalLm:
    """Row (b, t) is the distribution of token t + 1; padding and ignored labels have no row."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits of the predicted tokens."""
        logits = first_tensor(batch.call(model))
        if logits.ndim != 3 or logits.shape[:2] != batch.tokens.shape:
            raise BadModel(f"logits must be (samples, tokens, vocabulary). Got {tuple(logits.shape)}.")
        used = predicted(batch)
        rows = logits[:, :-1][used.to(logits.device)]
        sample = used.nonzero()[:, 0].cpu().numpy()
        return Outputs(at_least_float32(rows), sample, batch.size)

    def divergence(self, reference: Outputs, outputs: Outputs) -> PerSample:
        """KL per token, averaged over each sample's tokens."""
        return reference.means(softmax.kl_rows(reference, outputs))

    def change(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """See sensitivity/tasks/softmax.py."""
        return softmax.change_rows(reference, outputs)

    def sampled_objective(self, outputs: Outputs, generator: np.random.Generator) -> Tensor:
        """See sensitivity/tasks/softmax.py."""
        return softmax.sampled_objective(outputs, generator)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Cross-entropy in nats: per token, then per sample, then over samples."""
        weights = torch.as_tensor(1 / outputs.rows_per_sample[outputs.sample] / outputs.size)
        losses = cross_entropy(outputs.rows, targets(batch), reduction="none")
        return (losses * weights.to(losses)).sum()

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """Cross-entropy in nats per token of each sample."""
        return outputs.means(cross_entropy(outputs.rows, targets(batch), reduction="none"))

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """Perplexity of each sample."""
        with np.errstate(over="ignore"):
            return {"perplexity": np.exp(self.losses(outputs, batch))}

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Token ids as (samples, tokens), each sample with a token to predict."""
        if batch.tokens.ndim != 2 or batch.tokens.dtype != torch.int64:
            raise BadCalibration(
                "token ids must be whole numbers of shape (samples, tokens). "
                f"Got {batch.tokens.dtype} of shape {tuple(batch.tokens.shape)}."
            )
        for name, other in (("labels", batch.labels), ("attention_mask", batch.inputs.get("attention_mask"))):
            if other is not None and other.shape != batch.tokens.shape:
                raise BadCalibration(
                    f"{name} must have the shape of the token ids. Got {tuple(other.shape)}."
                )
        for row in (~predicted(batch).any(-1)).nonzero()[:1, 0].tolist():
            raise BadCalibration(f"every sample must have a token to predict. Got none in row {row}.")


def predicted(batch: Batch) -> Tensor:
    """True (size, length - 1) where token t + 1 is real, follows a real token and is not ignored."""
    real = batch.inputs.get("attention_mask")
    real = torch.ones_like(batch.tokens, dtype=torch.bool) if real is None else real.bool()
    used = real[:, 1:] & real[:, :-1]
    return used if batch.labels is None else used & (batch.labels[:, 1:] != IGNORED)


def targets(batch: Batch) -> Tensor:
    """The predicted tokens, in the order of the rows."""
    truth = batch.tokens if batch.labels is None else batch.labels
    return truth[:, 1:][predicted(batch)]
