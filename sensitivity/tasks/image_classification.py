"""Classifiers: one distribution over classes per sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sensitivity.errors import BadCalibration, MetricNotOffered
from sensitivity.tasks import softmax
from sensitivity.tasks.task import Batch, Outputs, PerSample, first_tensor, one_row_per_sample


class ImageClassification:
    """Logits (samples, classes); labels are class numbers (samples,)."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The class logits."""
        return one_row_per_sample(first_tensor(batch.call(model)), batch.size)

    def divergence(self, reference: Outputs, outputs: Outputs) -> PerSample:
        """KL of the class distributions."""
        return reference.sums(softmax.kl_rows(reference, outputs))

    def change(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """See sensitivity/tasks/softmax.py."""
        return softmax.change_rows(reference, outputs)

    def sampled_objective(self, outputs: Outputs, generator: np.random.Generator) -> Tensor:
        """See sensitivity/tasks/softmax.py."""
        return softmax.sampled_objective(outputs, generator)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Cross-entropy against the labels. Raises MetricNotOffered without labels."""
        return cross_entropy(outputs.rows, labels_of(batch))

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """Cross-entropy of each sample. Raises MetricNotOffered without labels."""
        return outputs.sums(cross_entropy(outputs.rows, labels_of(batch), reduction="none"))

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """Accuracy: 1 where the largest logit is at the label."""
        if batch.labels is None:
            return {}
        return {"accuracy": outputs.sums(outputs.rows.argmax(-1) == batch.labels)}

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Labels, if any, are class numbers (samples,) below the number of classes."""
        labels = batch.labels
        if labels is None:
            return
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise BadCalibration(
                "labels must be class numbers of shape (samples,). "
                f"Got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        for row in ((labels < 0) | (labels >= (width or torch.inf))).nonzero()[:1, 0].tolist():
            raise BadCalibration(
                f"labels must be class numbers from 0 to {(width or 0) - 1}. "
                f"Got {int(labels[row])} in row {row}."
            )


def labels_of(batch: Batch) -> Tensor:
    """The class numbers (samples,). Raises MetricNotOffered without labels."""
    if batch.labels is None:
        raise MetricNotOffered("a loss needs labels. Got none: add a tensor named labels to the data.")
    return batch.labels
