"""Any model: its output, flattened per sample, compared with the full-precision model's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.errors import MetricNotOffered
from sensitivity.tasks.task import Batch, Outputs, PerSample, first_tensor, one_row_per_sample


class Generic:
    """The first floating tensor of the output (or its `logits`), one flat row per sample."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The flattened outputs."""
        output = first_tensor(batch.call(model))
        return one_row_per_sample(output.reshape(output.shape[0], -1) if output.ndim else output, batch.size)

    def divergence(self, reference: Outputs, outputs: Outputs) -> PerSample:
        """Squared error relative to the squared norm of the sample's reference output."""
        return reference.sums(self.change(reference, outputs).double().square().sum(-1) / 2)

    def change(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """sqrt(2) times the error over the norm of the reference output."""
        norm: Tensor = reference.rows.norm(dim=-1, keepdim=True)
        return (outputs.rows - reference.rows) * (2**0.5 / norm)

    def sampled_objective(self, outputs: Outputs, generator: np.random.Generator) -> Tensor:
        """Output over its norm, held constant, times sqrt(2) and a standard normal vector."""
        noise = torch.as_tensor(generator.standard_normal(outputs.rows.shape)).to(outputs.rows)
        norm: Tensor = outputs.rows.detach().norm()
        return (outputs.rows * noise).sum() * (2**0.5 / norm)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Unknown for a generic model: always raises MetricNotOffered."""
        raise MetricNotOffered("a loss is not offered for generic models. Name a task, or use fisher.")

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """Unknown for a generic model: always raises MetricNotOffered."""
        raise MetricNotOffered("a loss is not offered for generic models. Name a task, or use fisher.")

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """Unknown for a generic model."""
        return {}

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Any sample that the model takes will do."""
