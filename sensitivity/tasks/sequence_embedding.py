"""Encoders of text: one vector per sample, compared by cosine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sensitivity.errors import BadCalibration, MetricNotOffered
from sensitivity.tasks.task import Batch, Outputs, PerSample, first_tensor, one_row_per_sample


class SequenceEmbedding:
    """The mean of the last hidden states over real tokens, or the model's own (samples, size) output."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The embeddings, not normalized."""
        hidden = first_tensor(batch.call(model), ("sentence_embedding", "last_hidden_state"))
        if hidden.ndim == 2:
            return one_row_per_sample(hidden, batch.size)
        mask = batch.inputs.get("attention_mask")
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask
        weights = weights.to(hidden.device, torch.float32)[..., None]
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        return one_row_per_sample((hidden * weights).sum(1) / weights.sum(1), batch.size)

    def divergence(self, reference: Outputs, outputs: Outputs) -> PerSample:
        """1 - cosine, as half the squared distance of the unit vectors: exact near 0."""
        return reference.sums(self.change(reference, outputs).double().square().sum(-1) / 2)

    def change(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Difference of the unit vectors."""
        return normalize(outputs.rows, dim=-1, eps=0) - normalize(reference.rows, dim=-1, eps=0)

    def sampled_objective(self, outputs: Outputs, generator: np.random.Generator) -> Tensor:
        """Unit vector times a standard normal vector."""
        noise = torch.as_tensor(generator.standard_normal(outputs.rows.shape)).to(outputs.rows)
        return (normalize(outputs.rows, dim=-1, eps=0) * noise).sum()

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Embeddings have no loss against a truth: always raises MetricNotOffered."""
        raise MetricNotOffered("a loss is not offered for sequence_embedding. Use fisher or output_kl.")

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """Embeddings have no loss against a truth: always raises MetricNotOffered."""
        raise MetricNotOffered("a loss is not offered for sequence_embedding. Use fisher or output_kl.")

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """None without a downstream benchmark: the divergence says it all."""
        return {}

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Each sample has a real token."""
        mask = batch.inputs.get("attention_mask")
        if mask is not None:
            for row in (mask.sum(-1) == 0).nonzero()[:1, 0].tolist():
                raise BadCalibration(f"every sample must have a token. Got none in row {row}.")
