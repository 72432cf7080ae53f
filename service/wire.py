"""What requests may say. Unknown members, NaN and infinity are refused; every bound is written here once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from quant.catalog import CHECKPOINTS, CORRECTIONS
from quant.devices import DeviceError, read_device
from quant.geometry import CACHE_BITS
from quant.runtimes import RUNTIMES, default_menu
from quant.schemes import parse_scheme
from search.budget import BudgetError, parse_budget, parse_limits
from search.choosers import CHOOSERS
from sensitivity.catalog import SCORERS, TASKS, unseen_activations

LARGEST_SEED = 2**53 - 1
MOST_BUDGETS, MOST_SCHEMES, MOST_PATTERNS, MOST_FILES = 64, 64, 1000, 10_000

WILDCARDS = frozenset("*?")

_T = TypeVar("_T")


def _problem(slug: str, message: str) -> PydanticCustomError:
    """A fault with its own slug; pydantic's own kinds have no dash in their names."""
    return PydanticCustomError(slug, "{message}", {"message": message})


def _scheme(text: str) -> str:
    try:
        return parse_scheme(text).name
    except ValueError as error:
        raise _problem("unknown-scheme", str(error)) from None


def _budget(text: str) -> str:
    try:
        parse_budget(text)
    except BudgetError as error:
        raise _problem("invalid-budget", str(error)) from None
    return text.strip()


def _one_of(kind: str, names: Any) -> Callable[[str], str]:
    """A validator that knows the catalog when it is called, so that a new entry needs no line here."""

    def check(name: str) -> str:
        if name not in names:
            raise _problem(
                f"unknown-{kind}",
                f"A {kind} must be one of {', '.join(names)}. Got {name!r}. Pick one of them.",
            )
        return name

    return check


def _device(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_device(value).as_json()
    except DeviceError as error:
        raise _problem("invalid-device", str(error)) from None


def _number(value: Any) -> Any:
    """Numbers may come as 64 or 64.0, not as text or booleans."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _distinct(values: list[_T]) -> list[_T]:
    if repeated := next((value for n, value in enumerate(values) if value in values[:n]), None):
        raise _problem("repeated-value", f"Entries must be distinct. Got {repeated!r} twice. Leave one out.")
    return values


Name = Annotated[str, Field(min_length=1, max_length=500)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Scheme = Annotated[Text, AfterValidator(_scheme)]
BudgetText = Annotated[Text, AfterValidator(_budget)]
Correction = Annotated[Name, AfterValidator(_one_of("correction", CORRECTIONS))]
Metric = Annotated[Name, AfterValidator(_one_of("metric", SCORERS))]
Runtime = Annotated[Name, AfterValidator(_one_of("runtime", RUNTIMES))]
CacheType = Annotated[Name, AfterValidator(_one_of("kv_cache", CACHE_BITS))]
Task = Annotated[Name, AfterValidator(_one_of("task", ("auto", *TASKS)))]
Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
CostTable = dict[Text, dict[Text, Annotated[Number, Field(ge=0)]]]
LatencySource = Annotated[
    Annotated[str, Field(pattern="^(measured|roofline:.+)$", max_length=200)] | CostTable,
    Field(
        description='"measured" on the worker\'s device, "roofline:h100" from a device profile, or a table: '
        "layer -> scheme -> nanoseconds.",
        examples=["roofline:h100"],
    ),
]
EnergySource = Annotated[
    Annotated[str, Field(pattern="^device:.+$", max_length=200)] | CostTable,
    Field(description='"device:h100" from a device profile, or a table: layer -> scheme -> picojoules.'),
]
DeviceProfile = Annotated[
    dict[str, Any],
    AfterValidator(_device),
    Field(description="A device of your own, as GET /v1/devices lists them; refer to it by its name."),
]
Patterns = Annotated[list[Text], Field(max_length=MOST_PATTERNS)]
Budgets = Annotated[
    list[BudgetText],
    Field(
        min_length=1,
        max_length=MOST_BUDGETS,
        description='Alternatives, each gives a plan: "3.5 bpw", "7 GiB", "bytes<=2 MiB,latency<=12 ms".',
        examples=[["3.5 bpw"]],
    ),
]
Limits = Annotated[
    list[BudgetText],
    Field(max_length=MOST_BUDGETS, description="Limits that hold together with every budget."),
]
Pins = Annotated[
    dict[Text, Scheme],
    Field(max_length=MOST_PATTERNS, description="Layer name or pattern -> the scheme it must get."),
]
Ties = Annotated[
    list[Annotated[list[Text], Field(min_length=1, max_length=MOST_PATTERNS)]],
    Field(max_length=MOST_PATTERNS, description="Sets of layer names or patterns that get one scheme."),
]
TimeLimit = Annotated[Number, Field(gt=0, le=3600, description="Seconds for one solve.")]
Gap = Annotated[Number, Field(ge=0, le=1, description="Proven relative gap to stop at.")]


class WireModel(BaseModel):
    """The rules that hold for every request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class ManifestFile(WireModel):
    """One file that will be sent."""

    path: str = Field(description="Plain file name, for example model.safetensors.", max_length=4096)
    size: Annotated[Integer, Field(ge=0, le=2**50)] = Field(description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the content, lowercase hex.")


class UploadRequest(WireModel):
    """The files of a model or of a calibration set."""

    purpose: Literal["model", "calibration"] = Field(description="What the files become.")
    files: list[ManifestFile] = Field(
        min_length=1, max_length=MOST_FILES, description="Every file, each once."
    )


class ModelRequest(WireModel):
    """Where a model comes from: exactly one of the members."""

    upload: Name | None = Field(None, description="Id of an upload whose blobs have all arrived.")
    folder: Text | None = Field(None, description="A folder of the server inside BITPLAN_MODEL_FOLDERS.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRequest:
        if (self.upload is None) == (self.folder is None):
            raise _problem(
                "invalid-source",
                "A model must come from either upload or folder. Got both or none. Name one of them.",
            )
        return self


class CalibrationRequest(WireModel):
    """Where a calibration set comes from."""

    upload: Name = Field(description="Id of an upload whose blobs have all arrived.")


class Deployment(WireModel):
    """How the model will be served: adds checkpoint, cache, memory and active bytes to the resources."""

    context_length: Integer = Field(default=4096, ge=1, le=2**24, description="Tokens in each cache.")
    batch: Integer = Field(default=1, ge=1, le=65_536, description="Sequences at a time.")
    kv_cache: CacheType = Field(default="float16", description="Type of cached keys and values.")


class JobRequest(WireModel):
    """A search: measure what each layer loses in each scheme, then plan every budget."""

    model: Name = Field(description="Id of a model.", examples=["model_0199a0..."])
    calibration: Name = Field(description="Id of a calibration set.", examples=["cal_0199a0..."])
    budgets: Budgets
    runtime: Runtime | None = Field(
        default=None, description="What will run the plans: its rules become ties and forbidden choices."
    )
    schemes: Annotated[
        list[Scheme], Field(min_length=1, max_length=MOST_SCHEMES), AfterValidator(_distinct)
    ] = Field(
        default_factory=lambda: list(default_menu()),
        description="The menu; the runtime's default one when left out (GET /v1/runtimes). Short names mean "
        "per output channel, symmetric, float16 scales, MSE-clipped.",
    )
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=32), AfterValidator(_distinct)] = Field(
        default=["output_kl"], description="What to measure; the first decides."
    )
    interactions: bool = Field(
        default=True, description="Also measure gram_output and try quadratic models of the plan's loss."
    )
    corrections: Annotated[list[Correction], AfterValidator(_distinct)] = Field(
        default=[],
        max_length=len(CORRECTIONS),
        description="What plans change beside weights, on the calibration data: bias, batch_norm. Whole plans"
        " and uniform schemes are measured so.",
    )
    task: Task = Field(default="auto", description="What the model is for.")
    limits: Limits = []
    pins: Pins = {}
    ties: Ties = []
    include: Patterns = Field(default=[], description="Embeddings or heads that take part too (patterns).")
    exclude: Patterns = Field(default=[], description="Layers that keep their precision (patterns).")
    samples: Integer = Field(
        default=64, ge=8, le=100_000, description="At most this many per calibration part."
    )
    sequence_length: Integer = Field(default=512, ge=2, le=131_072, description="Tokens per sample of text.")
    seed: Integer = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of parts, probes and searches.")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the workers measure.")
    relative_error: Number = Field(
        default=0.1, gt=0, le=1, description="Relative standard error at which a Hessian trace is done."
    )
    max_probes: Integer = Field(
        default=128, ge=2, le=100_000, description="Most Hutchinson probes per layer."
    )
    batch_size: Integer = Field(default=8, ge=1, le=4096, description="Samples per forward pass.")
    evaluations: Integer = Field(
        default=40, ge=0, le=10_000, description="Measured plans of the local search, per budget."
    )
    chooser: Annotated[Name, AfterValidator(_one_of("chooser", CHOOSERS))] = Field(
        default="local_search", description="How plans are tried beyond the candidates: see GET /v1/solvers."
    )
    time_limit_seconds: TimeLimit = 60.0
    gap: Gap = 1e-9
    latency: LatencySource | None = None
    latency_ns: CostTable | None = Field(
        default=None, description="A latency table, as `latency` takes it too; give one of the two."
    )
    energy: EnergySource | None = None
    deployment: Deployment | None = None
    device_profile: DeviceProfile | None = None
    labels: dict[Name, Annotated[str, Field(max_length=500)]] = Field(
        default={}, max_length=64, description="Your own words; returned as they are."
    )
    name: Annotated[str, Field(max_length=200)] | None = Field(default=None, description="For people.")

    @model_validator(mode="before")
    @classmethod
    def _menu(cls, members: Any) -> Any:
        """A request without schemes gets its runtime's menu."""
        if not isinstance(members, dict) or "schemes" in members:
            return members
        runtime = members.get("runtime")
        known = runtime if isinstance(runtime, str) and runtime in RUNTIMES else None
        return {**members, "schemes": list(default_menu(known))}

    @model_validator(mode="after")
    def _uniform_schemes(self) -> JobRequest:
        """A limit such as "uniform w4" must name a scheme that is measured."""
        known = {*self.schemes, *self.pins.values()}
        for limit in parse_limits((*self.budgets, *self.limits)):
            if limit.uniform and _scheme(limit.uniform) not in known:
                raise _problem(
                    "unknown-scheme",
                    f"A uniform limit must name a scheme of the menu: {', '.join(self.schemes)}."
                    f" Got {limit.uniform!r:.80}. Pick one of them, or add it to the schemes.",
                )
        return self

    @model_validator(mode="after")
    def _one_latency(self) -> JobRequest:
        if self.latency is not None and self.latency_ns is not None:
            raise _problem(
                "repeated-value", "Latency must come from latency or latency_ns. Got both. Leave one out."
            )
        return self

    @model_validator(mode="after")
    def _seen_activations(self) -> JobRequest:
        rounding = [name for name in (*self.schemes, *self.pins.values()) if parse_scheme(name).activation]
        blind = [name for name in self.metrics if not SCORERS[name].sees_activations]
        if rounding and blind:
            raise _problem("metric-not-offered", unseen_activations(blind[0], rounding[0]))
        return self

    @property
    def takes_part(self) -> tuple[str, ...]:
        """The patterns of `include`, and every pin that names a layer outright: a pinned head takes part."""
        named = [pattern for pattern in self.pins if not WILDCARDS & set(pattern)]
        return tuple(dict.fromkeys((*self.include, *named)))


class CheckpointRequest(WireModel):
    """What a plan's weights are written for."""

    consumer: Annotated[
        str, AfterValidator(_one_of("consumer", CHECKPOINTS)), Field(description="Who loads them.")
    ]
    force: bool = Field(
        default=False,
        description="Write them although the plan was made with other versions of quantizers; told in the"
        " provenance.",
    )


class PlansRequest(WireModel):
    """An instant re-solve from stored scores; limits, pins and ties that are left out are those of the
    job.
    """

    budgets: Budgets
    limits: Limits | None = None
    pins: Pins | None = None
    ties: Ties | None = None
    metric: Metric | None = Field(
        default=None, description="A metric of the job; its first one when left out."
    )
    time_limit_seconds: Annotated[Number, Field(gt=0, le=60, description="Seconds for one solve.")] = 10.0
    gap: Gap = 1e-9
    runtime: Runtime | None = Field(
        default=None, description='Its rules hold too; the job\'s own when left out, "generic" for none.'
    )
    latency: LatencySource | None = None
    energy: EnergySource | None = None
    deployment: Deployment | None = None
    device_profile: DeviceProfile | None = None
