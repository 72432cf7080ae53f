"""What a measuring session needs to know, as JSON-able values. Front: no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal, Self, get_args

from quant.catalog import QUANTIZERS
from sensitivity.catalog import SCORERS, TASKS

Json = Any
"""A value that `json.dumps` takes."""

SCORES_VERSION = 1
"""Raised when calibration, tasks or the session itself change what every metric returns."""

PARTS = ("scoring", "choosing", "reporting")
ALL = "all"
"""Every sample, for measuring a plan on data that did nothing else."""

Part = Literal["scoring", "choosing", "reporting"]
Precision = Literal["stored", "float32"]
DataKind = Literal["safetensors", "npz", "text", "jsonl"]


@dataclass(frozen=True)
class ModelSource:
    """Where the model is: a Hugging Face folder, or the user's own factory `package.module:function`.

    `digest` identifies the weights, not the place; scores of equal digests are shared.
    """

    kind: Literal["folder", "factory"]
    location: str
    digest: str

    def __post_init__(self) -> None:
        if self.kind not in ("folder", "factory"):
            raise ValueError(f"kind of a model must be folder or factory. Got {self.kind!r}.")


@dataclass(frozen=True)
class DataSource:
    """A calibration file and the digest of its content."""

    path: str
    kind: DataKind
    digest: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(DataKind):
            kinds = ", ".join(get_args(DataKind))
            raise ValueError(f"kind of calibration data must be one of {kinds}. Got {self.kind!r}.")


NO_DATA = DataSource("", "text", "")
"""Stands in a spec where only the model is looked at."""


@dataclass(frozen=True)
class UserMetric:
    """The user's own measure, `package.module:function`, and the digest of its module's source."""

    location: str
    digest: str


@dataclass(frozen=True)
class SessionSpec:
    """Everything that decides what a session measures.

    samples          at most so many samples in each of the three parts
    sequence_length  tokens per sample of text
    relative_error   stopping rule of sampled metrics: stderr / |value|
    max_probes       the most probes per layer of sampled metrics
    precision        "stored" computes in the type of the stored weights, "float32" half precision in float32
    batch_size       fixed micro-batch of forward passes: part of what makes a number repeatable
    threads          of torch, per worker process
    memory_limit     bytes of anonymous memory that a worker may use; None for no limit
    statistics       where quantizers get the statistics of inputs from, if not from these data
    user_metric      the user's own measure of outputs; only where the user's own code may run

    >>> spec = SessionSpec(ModelSource("folder", "m", "aa"), DataSource("c.txt", "text", "bb"))
    >>> SessionSpec.from_json(spec.as_json()) == spec
    True
    >>> "exclude" in spec.score_settings(), spec.score_settings()["device"]
    (False, 'cpu')
    """

    model: ModelSource
    calibration: DataSource
    task: str = "auto"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    relative_error: float = 0.1
    max_probes: int = 128
    batch_size: int = 8
    threads: int = 1
    memory_limit: int | None = None
    precision: Precision = "stored"
    statistics: SessionSpec | None = None
    user_metric: UserMetric | None = None

    def __post_init__(self) -> None:
        if self.task != "auto" and self.task not in TASKS:
            raise ValueError(f"task must be auto or one of {', '.join(TASKS)}. Got {self.task!r}.")
        if self.precision not in ("stored", "float32"):
            raise ValueError(f"precision must be stored or float32. Got {self.precision!r}.")
        for name, least in _LEAST.items():
            _require_whole(name, getattr(self, name), least)
        if self.memory_limit is not None:
            _require_whole("memory_limit", self.memory_limit, 1)
        if not (math.isfinite(self.relative_error) and self.relative_error > 0):
            raise ValueError(f"relative_error must be a positive number. Got {self.relative_error!r}.")

    def as_json(self) -> dict[str, Json]:
        """Plain JSON, the inverse of `from_json`."""
        statistics = None if self.statistics is None else self.statistics.as_json()
        lists = {"include": list(self.include), "exclude": list(self.exclude)}
        return asdict(self) | lists | {"statistics": statistics}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Self:
        """The spec that `as_json` wrote; a field that is unknown or missing raises TypeError."""
        fields = dict(value)
        model, calibration = ModelSource(**fields.pop("model")), DataSource(**fields.pop("calibration"))
        include, exclude = tuple(fields.pop("include", ())), tuple(fields.pop("exclude", ()))
        other, own = fields.pop("statistics", None), fields.pop("user_metric", None)
        statistics = None if other is None else cls.from_json(other)
        return cls(
            model=model,
            calibration=calibration,
            include=include,
            exclude=exclude,
            statistics=statistics,
            user_metric=None if own is None else UserMetric(**own),
            **fields,
        )

    def score_settings(self) -> dict[str, Json]:
        """What the digest of a score set is made of: all that can change a score, nothing that cannot.

        Places, patterns, threads and the memory limit are left out: they decide which layers are measured,
        where and how.
        """
        statistics = {} if self.statistics is None else {"statistics": self.statistics.score_settings()}
        precision = {} if self.precision == "stored" else {"precision": self.precision}
        own = {} if self.user_metric is None else {"user_metric": asdict(self.user_metric)}
        return {
            **statistics,
            **precision,
            **own,
            "model": self.model.digest,
            "calibration": self.calibration.digest,
            "calibration_kind": self.calibration.kind,
            "task": self.task,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "relative_error": self.relative_error,
            "max_probes": self.max_probes,
            "batch_size": self.batch_size,
            "device": self.device.split(":")[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
            "scores_version": SCORES_VERSION,
            "revisions": _revisions(),
        }


_LEAST = {"samples": 2, "sequence_length": 2, "seed": 0, "max_probes": 2, "batch_size": 1, "threads": 1}


def _require_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}. Got {value!r}.")


def _revisions() -> dict[str, int]:
    """Metrics and quantizers that no longer return what their first version did.

    Entries at version 1 are left out, so that a new metric does not turn old scores away.
    """
    versions = {f"metric:{name}": metric.version for name, metric in SCORERS.items()}
    versions |= {f"quantizer:{name}": quantizer.version for name, quantizer in QUANTIZERS.items()}
    return {name: int(number) for name, number in versions.items() if int(number) != 1}
