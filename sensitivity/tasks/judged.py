"""A task whose outputs are judged by a function of the user's own, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch

from sensitivity.catalog import USER_METRIC
from sensitivity.errors import BadUserMetric
from sensitivity.tasks.task import Batch, Outputs, PerSample, Task

Judge = Callable[[Outputs, Batch, Outputs], Any]
"""(outputs, batch, full-precision outputs) -> one number per sample (size,), smaller is better."""


def judged(task: Task, judge: Judge) -> Task:
    """The task with `user_metric` among its measures of quality, after its own."""
    return cast("Task", _Judged(task, judge))


class _Judged:
    def __init__(self, task: Task, judge: Judge) -> None:
        self._task, self._judge = task, judge

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """The task's own, and the user's. Raises BadUserMetric."""
        own = self._task.quality(outputs, batch, reference)
        return {**own, USER_METRIC: self._values(outputs, batch, reference)}

    def _values(self, outputs: Outputs, batch: Batch, reference: Outputs) -> PerSample:
        try:
            given = self._judge(outputs, batch, reference)
            numbers = given.detach().cpu() if isinstance(given, torch.Tensor) else given
            values = np.asarray(numbers, dtype=np.float64)
        except Exception as error:
            raise BadUserMetric(
                "user_metric must work as function(outputs, batch, reference). "
                f"Got {type(error).__name__}: {error!s:.300}."
            ) from error
        if values.shape != (batch.size,) or not np.isfinite(values).all():
            raise BadUserMetric(
                f"user_metric must give one finite number for each of {batch.size} samples. "
                f"Got shape {values.shape}{'' if np.isfinite(values).all() else ' with NaN or infinity'}."
            )
        return values
