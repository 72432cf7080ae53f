"""What can go wrong while measuring, as one small tree.

    SessionError(ValueError)      kind
      BadModel                    bad_model
      BadCalibration              bad_calibration
      BadPattern                  bad_pattern
      BadUnit                     bad_unit
      BadUserMetric               bad_user_metric
      DiskFull                    disk_full
      MemoryLimitTooLow           memory_limit
      MetricNotOffered            metric_not_offered
      ModelAlreadyQuantized       already_quantized
      ModelHasNothingToQuantize   nothing_to_quantize
      NonFiniteWeights            non_finite
      NonFiniteScore              non_finite

`kind` is stable; the API maps it to a problem type. Front: imports nothing.
"""

# ruff: noqa: N818  (an error is named after what went wrong)

from __future__ import annotations


class SessionError(ValueError):
    """Base of every error that a `Session` raises on purpose."""

    kind = "session_error"


class BadModel(SessionError):
    """The model cannot be loaded, or its weights do not match its configuration."""

    kind = "bad_model"


class BadCalibration(SessionError):
    """The calibration data cannot be read or do not fit the model."""

    kind = "bad_calibration"


class BadPattern(SessionError):
    """An include or exclude pattern matches nothing."""

    kind = "bad_pattern"


class BadUnit(SessionError):
    """A unit names a layer, a scheme, a metric or a block that this session does not have."""

    kind = "bad_unit"


class BadUserMetric(SessionError):
    """The user's own measure cannot be imported, fails, or gives something else than numbers."""

    kind = "bad_user_metric"


class DiskFull(SessionError):
    """The disk has no room for activations."""

    kind = "disk_full"


class MemoryLimitTooLow(SessionError):
    """The limit on anonymous memory holds less than a measurement takes."""

    kind = "memory_limit"

    def __init__(self, needed: int, limit: int, what: str) -> None:
        super().__init__(
            f"memory_limit must hold {what}: {needed / 2**20:,.0f} MiB. Got {limit / 2**20:,.0f} MiB. "
            "Raise it, or take shorter samples or a smaller batch_size."
        )


class MetricNotOffered(SessionError):
    """The metric needs something (labels, a loss) that this task or these data do not give."""

    kind = "metric_not_offered"


class ModelAlreadyQuantized(SessionError):
    """The model's weights are quantized already."""

    kind = "already_quantized"


class ModelHasNothingToQuantize(SessionError):
    """No layer of the model takes part."""

    kind = "nothing_to_quantize"


class NonFiniteWeights(SessionError):
    """A stored weight is NaN or infinite."""

    kind = "non_finite"


class NonFiniteScore(SessionError):
    """A measurement came out NaN or infinite; it never becomes a score."""

    kind = "non_finite"

    def __init__(self, metric: str, layer: str, scheme: str, got: str) -> None:
        self.metric, self.layer, self.scheme = metric, layer, scheme
        where = f"layer {layer!r} with scheme {scheme!r}" if layer else "the model"
        super().__init__(
            f"{metric} of {where} must be finite. Got {got}. "
            "Check the weights and the calibration data, or leave the layer out with an exclude pattern."
        )
