"""What plans are compared by on the choosing part: one loss per plan, and the same over each half of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.compile import Assignment
from search.refine import Measured
from sensitivity.contexts import context_of
from service.deciding import MAXIMUM, Deciding
from service.planning.result import is_decoupled
from service.runner.lab import Lab, Quality, among
from service.states import Stage

LEAST = 2
"""Samples of every context that a half must have."""

Masks = Mapping[str, NDArray[np.bool_]]
"""Context -> which samples are in it; the whole part under "" where there are none."""


class Losses:
    """The losses of plans of one problem. `contexts` are those of the choosing part (see Deciding.chosen)."""

    def __init__(self, lab: Lab, metric: str, deciding: Deciding, contexts: Masks) -> None:
        self._lab, self._metric, self._deciding = lab, metric, deciding
        context = context_of(metric)
        self._contexts = contexts if context is None else {context: contexts[context]}

    def __call__(self, assignments: Sequence[Assignment]) -> list[Measured]:
        """The loss of each plan: the divergence, or with metric_decoupled the losses of its metrics; of one
        context, or over them all as the request says.
        """
        return [self.of(pair) for pair in self._lab.quality(assignments, "choosing", Stage.SOLVING)]

    def of(self, quality: Quality) -> Measured:
        """The loss of what was measured of one plan, with its halves where they have samples enough."""
        masks = self._contexts or {"": np.ones(len(quality[0].per_sample), dtype=np.bool_)}
        halves = [{name: every_other(chosen, half) for name, chosen in masks.items()} for half in (0, 1)]
        whole = self._over(quality, masks)
        if any(chosen.sum() < LEAST for half in halves for chosen in half.values()):
            return whole
        return replace(whole, halves=tuple(self._over(quality, half).mean for half in halves))

    def _over(self, quality: Quality, masks: Masks) -> Measured:
        loss = decoupled_loss if is_decoupled(self._metric) else divergence_loss
        losses = {name: loss(*among(quality, chosen)) for name, chosen in masks.items()}
        return next(iter(losses.values())) if len(losses) == 1 else over_contexts(losses, self._deciding)


def every_other(chosen: NDArray[np.bool_], first: int) -> NDArray[np.bool_]:
    """Every second one of the chosen samples.

    >>> every_other(np.array([True, False, True, True]), 0).tolist()
    [True, False, False, True]
    """
    half = np.zeros_like(chosen)
    half[np.flatnonzero(chosen)[first::2]] = True
    return half


def over_contexts(losses: Mapping[str, Measured], deciding: Deciding) -> Measured:
    """The weighted mean of the losses in each context, or the worst of them; its parts are all that count."""
    counted = {name: measured for name, measured in losses.items() if deciding.weight(name)}
    means = {name: measured.mean for name, measured in counted.items()}
    if deciding.plans == MAXIMUM:
        return replace(max(losses.values(), key=lambda measured: measured.mean), parts=means)
    weighted = [(deciding.weight(name), measured) for name, measured in losses.items()]
    return Measured(
        float(sum(weight * measured.mean for weight, measured in weighted)),
        float(np.hypot.reduce([weight * measured.stderr for weight, measured in weighted])),
        np.concatenate([measured.per_sample for _, measured in weighted]),
        parts=means,
    )


def divergence_loss(measured: Measured, _: Mapping[str, NDArray[np.float64]]) -> Measured:
    """The divergence alone."""
    return measured


def decoupled_loss(measured: Measured, quality: Mapping[str, NDArray[np.float64]]) -> Measured:
    """The geometric mean of the divergence and of what images lose in structural similarity, where there are
    images: the mean whose order of plans does not depend on units. Those two are its parts.
    """
    losses = {"divergence": measured.per_sample}
    if "ssim" in quality:
        losses["1 - ssim"] = 1 - quality["ssim"]
    means = {name: max(float(loss.mean()), np.finfo(np.float64).tiny) for name, loss in losses.items()}
    center = float(np.exp(np.mean(np.log([*means.values()]))))
    relative = np.mean([loss / means[name] - 1 for name, loss in losses.items()], axis=0)
    stderr = center * float(relative.std(ddof=1)) / len(relative) ** 0.5
    return Measured(center, stderr, center * (1 + relative), parts=means if len(means) > 1 else {})
