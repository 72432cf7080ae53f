"""The metric of softmax outputs: Kullback-Leibler divergence and its second-order form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sensitivity.tasks.task import Outputs

LARGEST_STEP = 20.0
"""Logits that move by more take the plain formula: the series form would overflow."""


def kl_rows(reference: Outputs, outputs: Outputs) -> Tensor:
    """KL(softmax(reference) || softmax(outputs)) of each row (n,).

    With d the change of the logits centered by the probabilities p, KL = log(1 + sum p (e^d - 1 - d)):
    no cancellation, so small divergences keep their digits in float32.
    """
    p, step = reference.probabilities, centered_step(reference, outputs)
    if step.abs().max() > LARGEST_STEP:
        return _plain_kl_rows(reference.rows, outputs.rows)
    return torch.log1p((p * (torch.expm1(step) - step)).sum(-1, dtype=torch.float64))


def _plain_kl_rows(reference: Tensor, rows: Tensor) -> Tensor:
    log_p, log_q = reference.double().log_softmax(-1), rows.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def centered_step(reference: Outputs, outputs: Outputs) -> Tensor:
    """Change of the logits (n, k) less its mean under the reference probabilities."""
    step = outputs.rows - reference.rows
    return step - (reference.probabilities * step).sum(-1, keepdim=True)


def change_rows(reference: Outputs, outputs: Outputs) -> Tensor:
    """Centered steps scaled by the square roots of the probabilities, each sample's rows averaged."""
    per_row = torch.as_tensor(reference.rows_per_sample[reference.sample] ** -0.5)
    scale = per_row.to(reference.rows.device, reference.rows.dtype)
    return centered_step(reference, outputs) * reference.probabilities.sqrt() * scale[:, None]


def sampled_objective(outputs: Outputs, generator: np.random.Generator) -> Tensor:
    """Cross-entropy against labels drawn from the model, summed over rows / sqrt(rows)."""
    with torch.no_grad():
        cumulative = outputs.rows.double().softmax(-1).cumsum(-1)
        points = torch.as_tensor(generator.random(len(outputs.rows))).to(cumulative.device)[:, None]
        labels = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).squeeze(-1)
        labels.clamp_(max=outputs.rows.shape[-1] - 1)
    scale: float = len(outputs.rows) ** -0.5
    return cross_entropy(outputs.rows, labels, reduction="sum") * scale
