"""The units of work a session runs, and what it returns. Front: no torch.

A unit is a frozen value with a stable `key`; running the same unit again gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quant.catalog import CORRECTIONS
from quant.digest import digest
from sensitivity.spec import Json, SessionSpec

KEY_LIMIT = 200
"""No key is longer; long names are replaced by a digest."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ScoreUnit:
    """All `metrics` of one (layer, scheme), or of (attention layer, `kv-` and a type of cache): they share
    one pass over the scoring part.

    >>> ScoreUnit("fc", "w4", ("output_kl",)).key
    'score:fc:w4:output_kl'
    """

    layer: str
    scheme: str
    metrics: tuple[str, ...]

    @property
    def key(self) -> str:
        """Stable and unique among units."""
        return _short_key("score", f"{self.layer}:{self.scheme}:{'+'.join(self.metrics)}")

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        return {"unit": "score", "layer": self.layer, "scheme": self.scheme, "metrics": list(self.metrics)}


@dataclass(frozen=True)
class BlockUnit:
    """One block of samples or probes of one metric, for many layers and schemes at once.

    `block` says which: "samples:0:8", "layer:NAME:probes:0:16", "layer:NAME:errors". `given` are arrays that
    earlier blocks of the metric came to: they follow from the settings, so they are no part of the key or of
    the JSON, and travel beside it.
    """

    metric: str
    block: str
    schemes: tuple[str, ...]
    layers: tuple[str, ...]
    given: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Stable and unique among units; layers and schemes enter as a digest."""
        contents = digest([list(self.layers), list(self.schemes)])[:32]
        return _short_key("block", f"{self.metric}:{self.block}:{contents}")

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        lists = {"schemes": list(self.schemes), "layers": list(self.layers)}
        return {"unit": "block", "metric": self.metric, "block": self.block} | lists


@dataclass(frozen=True)
class MeasureUnit:
    """The quality of one whole plan on one part; `()` measures the full-precision model.

    Pairs are (layer, scheme), or (attention layer or pattern, `kv-` and a type of cache).
    `corrections` are keys of quant.catalog.CORRECTIONS: what changes beside the weights.
    """

    assignment: tuple[tuple[str, str], ...]
    part: Literal["choosing", "reporting", "all"]
    corrections: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in ("choosing", "reporting", "all"):
            raise ValueError(f"part must be choosing, reporting or all. Got {self.part!r}.")
        ordered = tuple(sorted((str(layer), str(scheme)) for layer, scheme in self.assignment))
        object.__setattr__(self, "assignment", ordered)
        object.__setattr__(self, "corrections", tuple(sorted(self.corrections)) if ordered else ())

    @property
    def key(self) -> str:
        """Stable and unique among units; the assignment enters as a digest."""
        key = f"measure:{self.part}:{digest([list(pair) for pair in self.assignment])}"
        changes = [f"{name}{CORRECTIONS[name].version}" for name in self.corrections]
        return ":".join([key, *changes])

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        return {
            "unit": "measure",
            "assignment": [list(pair) for pair in self.assignment],
            "part": self.part,
            "corrections": list(self.corrections),
        }


@dataclass(frozen=True)
class InspectUnit:
    """Load model and data once and say what they are; the patterns are those of the session.

    The number in the key is raised when the facts say more than before.

    >>> InspectUnit().key
    'inspect:2'
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Stable and unique among units; patterns enter as a digest."""
        if not (self.include or self.exclude):
            return "inspect:2"
        return f"inspect:2:{digest([list(self.include), list(self.exclude)])}"

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        return {"unit": "inspect", "include": list(self.include), "exclude": list(self.exclude)}


@dataclass(frozen=True)
class TimingUnit:
    """Time kernels (`quant.latency.Case.as_json`) on the worker's device.

    `known` are the keys of cases that need no timing, by fingerprint of the device they were timed on.
    """

    cases: tuple[Mapping[str, Json], ...]
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Stable and unique among units; the cases enter as a digest."""
        return f"timing:{digest([dict(case) for case in self.cases])}"

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        known = {name: list(keys) for name, keys in self.known.items()}
        return {"unit": "timing", "cases": [dict(case) for case in self.cases], "known": known}


@dataclass(frozen=True)
class WriteUnit:
    """Write a plan's checkpoint for a consumer; `folder` holds the plan and receives the result.

    >>> WriteUnit("vllm", "/tmp/x").key
    'write:vllm'
    """

    consumer: str
    folder: str
    force: bool = False

    @property
    def key(self) -> str:
        """Stable and unique among the units of a job that writes a checkpoint."""
        return _short_key("write", self.consumer)

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        return {"unit": "write", "consumer": self.consumer, "folder": self.folder, "force": self.force}


@dataclass(frozen=True)
class MakeUnit:
    """Make samples `start` to `stop` of calibration data from the model alone.

    method  a key of sensitivity.catalog.DATA_FREE
    length  tokens per sequence; images ignore it
    shape   channels, height and width of images, () as the model's configuration says

    >>> MakeUnit("random_tokens", 0, 8, 16).key
    'make:random_tokens:0:8:16::0'
    """

    method: str
    start: int
    stop: int
    length: int = 0
    shape: tuple[int, ...] = ()
    seed: int = 0

    @property
    def key(self) -> str:
        """Stable and unique among units."""
        shape = "x".join(str(size) for size in self.shape)
        return f"make:{self.method}:{self.start}:{self.stop}:{self.length}:{shape}:{self.seed}"

    def as_json(self) -> dict[str, Json]:
        """Plain JSON for `unit_from_json`."""
        return {"unit": "make", **asdict(self), "shape": list(self.shape)}


Unit = ScoreUnit | BlockUnit | MeasureUnit | InspectUnit | TimingUnit | WriteUnit | MakeUnit


def unit_from_json(value: Mapping[str, Json]) -> Unit:
    """The unit that `as_json` wrote. Raises ValueError for an unknown kind of unit."""
    read = _READERS.get(value.get("unit", ""))
    if read is None:
        known = ", ".join(_READERS)
        raise ValueError(f"unit must be one of {known}. Got {value.get('unit')!r}.")
    return read(value)


def _measure_unit(value: Mapping[str, Json]) -> MeasureUnit:
    assignment = tuple((layer, scheme) for layer, scheme in value["assignment"])
    return MeasureUnit(assignment, value["part"], tuple(value.get("corrections", ())))


def _timing_unit(value: Mapping[str, Json]) -> TimingUnit:
    known = {name: tuple(keys) for name, keys in value["known"].items()}
    return TimingUnit(tuple(value["cases"]), known)


def _make_unit(value: Mapping[str, Json]) -> MakeUnit:
    asked = {name: item for name, item in value.items() if name != "unit"}
    return MakeUnit(**asked | {"shape": tuple(value["shape"])})


_READERS: dict[str, Callable[[Mapping[str, Json]], Unit]] = {
    "score": lambda v: ScoreUnit(v["layer"], v["scheme"], tuple(v["metrics"])),
    "block": lambda v: BlockUnit(v["metric"], v["block"], tuple(v["schemes"]), tuple(v["layers"])),
    "measure": _measure_unit,
    "inspect": lambda v: InspectUnit(tuple(v.get("include", ())), tuple(v.get("exclude", ()))),
    "timing": _timing_unit,
    "write": lambda v: WriteUnit(v["consumer"], v["folder"], v["force"]),
    "make": _make_unit,
}


def draws_name(metric: str) -> str:
    """What a unit of choices calls the array (n,) of each sample's value of a metric."""
    return f"samples.{metric}"


@dataclass(frozen=True)
class ScoreRow:
    """What one (layer, scheme) costs in one metric; `samples` is 0 for a metric without data.

    `draws` (n,) are independent values whose mean is the score, the same samples or probes for every scheme
    of a layer; None where there are none.
    """

    layer: str
    scheme: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    draws: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class UnitResult:
    """What a unit gave. `facts["forwards"]` is its work in forward passes of one sample (a backward is 2)."""

    scores: tuple[ScoreRow, ...] = ()
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)


def misfit(unit: Unit, result: UnitResult) -> str | None:
    """Why this cannot be the result of the unit; None where it can be.

    >>> row = ScoreRow("a", "w4", "output_kl", 0.5, None, 8)
    >>> misfit(ScoreUnit("a", "w4", ("output_kl",)), UnitResult((row,)))
    >>> misfit(ScoreUnit("b", "w4", ("output_kl",)), UnitResult((row,)))
    'The result of score:b:w4:output_kl must have the scores b w4 output_kl. Got a w4 output_kl.'
    """
    wanted = []
    if isinstance(unit, ScoreUnit):
        wanted = [f"{unit.layer} {unit.scheme} {name}" for name in unit.metrics]
    got = [f"{row.layer} {row.scheme} {row.metric}" for row in result.scores]
    if sorted(wanted) != sorted(got):
        must = f"have the scores {', '.join(wanted)}" if wanted else "have no scores"
        return f"The result of {unit.key} must {must}. Got {', '.join(got) or 'none'}."
    lacking = isinstance(unit, BlockUnit | MeasureUnit) and not result.arrays
    lacking = lacking or (isinstance(unit, InspectUnit) and len(result.facts) < 2)
    return f"The result of {unit.key} must say what was measured. Got nothing of it." if lacking else None


@dataclass(frozen=True)
class BlockPlan:
    """What a block metric is asked for: every (layer, scheme), on `samples` samples of the scoring part.

    `settings` are those of the sessions that measure it, with the batch size that an inspection found: large
    outputs make it smaller than what was asked.
    """

    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    samples: int
    settings: SessionSpec


def _short_key(kind: str, rest: str) -> str:
    key = f"{kind}:{rest}"
    return key if len(key) <= KEY_LIMIT else f"{kind}:{digest(rest)}"
