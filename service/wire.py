"""What requests may say. Unknown members, NaN and infinity are refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quant.catalog import CORRECTIONS
from quant.geometry import CACHE_BITS
from quant.kv_cache import FULL, FULL_TYPES, cache_scheme, is_cache
from quant.runtimes import RUNTIMES, default_menu
from search.budget import parse_limits
from search.choosers import CHOOSERS
from search.decoupled import RATIOS
from search.objectives.catalog import DEFAULT as DEFAULT_OBJECTIVE
from search.objectives.catalog import parse_objective
from search.objectives.quadratic import Quadratic
from sensitivity.catalog import AUTO, DATA_FREE, DECOUPLED, INTERACTIONS, SCORERS, unseen
from service.fields import (
    LARGEST_SEED,
    MOST_FILES,
    MOST_NUMBERS,
    MOST_PATTERNS,
    MOST_SCHEMES,
    WILDCARDS,
    AnyBudgets,
    Budgets,
    CacheType,
    Correction,
    CostTable,
    Deadline,
    DeviceProfile,
    EnergySource,
    Forbid,
    Gap,
    Integer,
    LatencySource,
    Limits,
    MemoryText,
    Metric,
    MetricOrAuto,
    Name,
    Number,
    ObjectiveText,
    Patterns,
    Pins,
    Protect,
    Ratio,
    RoleLimits,
    RoleMetrics,
    RoleName,
    Runtime,
    Scheme,
    SmallerCache,
    Targets,
    Task,
    Text,
    Ties,
    TimeLimit,
    WebhookSecret,
    WebhookUrl,
    any_scheme,
    checkpoint_consumer,
    distinct,
    hub_commit,
    hub_folder,
    hub_repository,
    objective_fault,
    one_of,
    refusal,
)


def _can_refine(name: str, entry: Any) -> bool:
    alone = entry.unit == "choice" and name not in INTERACTIONS
    return bool(alone and entry.additive and entry.direction == "min")


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


class HubModel(WireModel):
    """A repository of a hub at one commit."""

    repository: Annotated[Text, AfterValidator(hub_repository)] = Field(description="owner/name.")
    commit: Annotated[Text, AfterValidator(hub_commit)] = Field(
        description="All 40 hexadecimal digits; branches and tags move and are refused."
    )
    folder: Annotated[str, AfterValidator(hub_folder)] = Field(
        "", max_length=2000, description="Where config.json is, for example unet; empty for the root."
    )


class ModelRequest(WireModel):
    """Where a model comes from: exactly one of the members."""

    upload: Name | None = Field(None, description="Id of an upload whose blobs have all arrived.")
    folder: Text | None = Field(None, description="A folder of the server inside BITPLAN_MODEL_FOLDERS.")
    hub: HubModel | None = Field(None, description="A repository of a hub, where BITPLAN_HUB allows it.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRequest:
        given = [source for source in (self.upload, self.folder, self.hub) if source is not None]
        if len(given) != 1:
            raise refusal(
                "invalid-source",
                f"A model must come from one of upload, folder and hub. Got {len(given)} of them. Name one.",
            )
        return self


class CalibrationRequest(WireModel):
    """Where a calibration set comes from."""

    upload: Name = Field(description="Id of an upload whose blobs have all arrived.")


class MakeCalibrationRequest(WireModel):
    """Calibration data that are made from a model alone."""

    method: Annotated[
        str, AfterValidator(one_of("method", DATA_FREE)), Field(description="How the data are made.")
    ]
    samples: Annotated[Integer, Field(ge=6, le=100_000)] = Field(
        default=192, description="Samples in all; a search cuts them into three parts."
    )
    sequence_length: Annotated[Integer, Field(ge=2, le=2**20)] = Field(
        default=512, description="Tokens per sequence."
    )
    shape: list[Annotated[Integer, Field(ge=1, le=2**14)]] = Field(
        default=[],
        max_length=3,
        description="Channels, height and width of images; the model's own when left out.",
    )
    seed: Annotated[Integer, Field(ge=0, le=LARGEST_SEED)] = 0

    @model_validator(mode="after")
    def _whole_shape(self) -> MakeCalibrationRequest:
        if len(self.shape) not in (0, 3):
            raise refusal(
                "invalid-shape",
                f"A shape must be channels, height and width. Got {self.shape}. Give three numbers or none.",
            )
        if prod(self.shape) > MOST_NUMBERS:
            raise refusal(
                "invalid-shape",
                f"A shape must have at most {MOST_NUMBERS} numbers. Got {self.shape}. Make images smaller.",
            )
        return self


class Deployment(WireModel):
    """How the model will be served: adds checkpoint, cache, memory and active bytes to the resources."""

    context_length: Integer = Field(default=4096, ge=1, le=2**24, description="Tokens in each cache.")
    batch: Integer = Field(default=1, ge=1, le=65_536, description="Sequences at a time.")
    kv_cache: CacheType = Field(
        default="float16", description="Type of cached keys and values where a job does not decide them."
    )


class Contexts(WireModel):
    """Scores split by what the samples are: classes that the data name, or ranges of timesteps."""

    plans: Literal["weighted", "maximum", "each"] = Field(
        default="weighted",
        description="One plan by the weighted mean over the contexts, or by the worst of them, or one each.",
    )
    edges: Annotated[list[Annotated[Number, Field(gt=0)]], Field(max_length=32)] = Field(
        default=[], description="Rising timesteps that cut ranges; none: the classes of the data."
    )
    weights: Annotated[dict[Name, Annotated[Number, Field(ge=0)]], Field(max_length=1000)] = Field(
        default={}, description="Of contexts in a weighted plan; 1 for those left out."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Contexts:
        if any(low >= high for low, high in pairwise(self.edges)):
            raise refusal("invalid-contexts", f"Edges must rise. Got {self.edges}. Sort them.")
        if self.weights and self.plans != "weighted":
            raise refusal("invalid-contexts", f"Weights must come with weighted plans. Got {self.plans!r}.")
        return self


class JobRequest(WireModel):
    """A search: measure what each layer loses in each scheme, then plan every budget."""

    model: Name = Field(description="Id of a model.", examples=["model_0199a0..."])
    calibration: Name = Field(description="Id of a calibration set.", examples=["cal_0199a0..."])
    targets: Targets = []
    budgets: AnyBudgets = Field(default=[], validate_default=True)
    runtime: Runtime | None = Field(
        default=None, description="What will run the plans: its rules become ties and forbidden choices."
    )
    schemes: Annotated[
        list[Scheme], Field(min_length=1, max_length=MOST_SCHEMES), AfterValidator(distinct)
    ] = Field(
        default_factory=lambda: list(default_menu()),
        description="The menu; the runtime's default one when left out (GET /v1/runtimes). Short names mean "
        "per output channel, symmetric, float16 scales, MSE-clipped.",
    )
    kv_cache: Annotated[list[SmallerCache], AfterValidator(distinct)] = Field(
        default=[],
        max_length=len(CACHE_BITS),
        description="Types of key-value cache to choose from for each attention layer, beside the full one;"
        " none: caches are not decided.",
        examples=[["fp8", "int8"]],
    )
    metrics: Annotated[list[MetricOrAuto], Field(min_length=1, max_length=32), AfterValidator(distinct)] = (
        Field(
            default=["output_kl"],
            description='What to measure; the first decides. ["auto"] picks by task, menu, memory and '
            "time, and says why.",
        )
    )
    refine_metric: Metric | None = Field(
        default=None,
        description="Decides instead of the first metric, but is measured only for choices near a decision "
        "at the budgets; elsewhere the first one stands for it, calibrated.",
    )
    time_budget_seconds: Number | None = Field(
        default=None, gt=0, le=10_000_000, description="What the search may take; for the metric auto."
    )
    interactions: bool = Field(
        default=True, description="Also measure gram_output and try quadratic models of the plan's loss."
    )
    corrections: Annotated[list[Correction], AfterValidator(distinct)] = Field(
        default=[],
        max_length=len(CORRECTIONS),
        description="What plans change beside weights, on the calibration data: bias, batch_norm. Whole plans"
        " and uniform schemes are measured so.",
    )
    role_metrics: RoleMetrics = {}
    roles: Annotated[dict[Text, RoleName], Field(max_length=MOST_PATTERNS)] = Field(
        default={},
        description="Layer name or pattern -> its role, where the model's structure does not tell.",
    )
    ratios: Annotated[list[Ratio], Field(min_length=1, max_length=32), AfterValidator(distinct)] = Field(
        default=list(RATIOS),
        description="For metric_decoupled: bits per weight of one metric's layers over those of the rest;"
        " each ratio gives a plan that is measured.",
    )
    contexts: Contexts | None = Field(
        default=None, description="Split scores by the samples' contexts; left out, all count together."
    )
    task: Task = Field(default="auto", description="What the model is for.")
    limits: Limits = []
    role_limits: RoleLimits = {}
    pins: Pins = {}
    ties: Ties = []
    protect: Protect = []
    forbid: Forbid = {}
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
    memory_limit: MemoryText | None = Field(
        default=None,
        description="Most anonymous memory of a worker; what does not fit is streamed block by block. The"
        " service's own limit holds too (BITPLAN_MEMORY_LIMIT).",
        examples=["2 GiB"],
    )
    evaluations: Integer = Field(
        default=40, ge=0, le=10_000, description="Measured plans of the local search, per budget."
    )
    chooser: Annotated[Name, AfterValidator(one_of("chooser", CHOOSERS))] = Field(
        default="local_search", description="How plans are tried beyond the candidates: see GET /v1/solvers."
    )
    time_limit_seconds: TimeLimit = 60.0
    gap: Gap = 1e-9
    objective: ObjectiveText = DEFAULT_OBJECTIVE
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

    @field_validator("budgets")
    @classmethod
    def _some(cls, budgets: list[str], info: ValidationInfo) -> list[str]:
        """A search has a budget or a target; a bad target is told on its own."""
        if not budgets and not info.data.get("targets", True):
            raise PydanticCustomError(
                "too_short", 'A search must have a budget or a target. Add for example "3.5 bpw".'
            )
        return budgets

    @model_validator(mode="after")
    def _plain_targets(self) -> JobRequest:
        """A target is of all samples, and takes the plain objective and scores of every choice."""
        odd = {
            "contexts": self.contexts is not None,
            "refine_metric": self.refine_metric is not None,
            "objective": self.objective != DEFAULT_OBJECTIVE,
        }
        named = [name for name, used in odd.items() if used]
        if self.targets and named:
            raise refusal(
                "invalid-target",
                "A target must be searched over all samples for the plain objective, without a refining"
                " metric: its sizes are those of the frontier of one metric's sum. Got"
                f" {' and '.join(named)}. Leave that out, or ask for budgets.",
            )
        return self

    @model_validator(mode="after")
    def _known_schemes(self) -> JobRequest:
        """A limit such as "uniform w4", and what is forbidden, must name schemes that are measured."""
        for limit in parse_limits((*self.budgets, *self.limits, *self.role_limits.values())):
            self._require_known("A uniform limit", [any_scheme(limit.uniform)] if limit.uniform else [])
        self._require_known("What is forbidden", [name for names in self.forbid.values() for name in names])
        return self

    def _require_known(self, what: str, schemes: Sequence[str]) -> None:
        known = {*self.schemes, *self.pins.values(), *map(cache_scheme, (FULL, *self.kv_cache))}
        for scheme in schemes:
            if scheme not in known:
                raise refusal(
                    "unknown-scheme",
                    f"{what} must name a scheme of the menu: {', '.join(self.schemes)}."
                    f" Got {scheme!r:.80}. Pick one of them, or add it to the schemes.",
                )

    @model_validator(mode="after")
    def _auto_alone(self) -> JobRequest:
        if AUTO in self.metrics and (len(self.metrics) > 1 or self.refine_metric):
            raise refusal(
                "invalid-metrics",
                f"The metric auto must stand alone. Got it beside {[*self.metrics, self.refine_metric]}."
                " Name the metrics, or leave all to auto.",
            )
        return self

    @model_validator(mode="after")
    def _refines(self) -> JobRequest:
        """What refines is measured one choice at a time, adds up, and is not the cheap metric."""
        refined = self.refine_metric
        if refined is None:
            return self
        if self.contexts is not None:
            raise refusal(
                "invalid-metrics",
                f"A refining metric must decide over all samples. Got {refined!r} beside contexts. Name it in"
                " metrics, or leave the contexts out.",
            )
        fit = [name for name, entry in SCORERS.items() if _can_refine(name, entry)]
        cheap = SCORERS[self.metrics[0]]
        if refined not in fit or refined in self.metrics or not (cheap.additive and cheap.direction == "min"):
            raise refusal(
                "invalid-metrics",
                f"A refining metric must be one of {', '.join(fit)}, beside an additive first metric to be"
                f" calibrated. Got {refined!r} beside {', '.join(self.metrics)}. Use for example gram_fisher"
                " refined by output_kl.",
            )
        return self

    @model_validator(mode="after")
    def _one_latency(self) -> JobRequest:
        if self.latency is not None and self.latency_ns is not None:
            raise refusal(
                "repeated-value", "Latency must come from latency or latency_ns. Got both. Leave one out."
            )
        return self

    @model_validator(mode="after")
    def _metrics_of_roles(self) -> JobRequest:
        if self.role_metrics and DECOUPLED not in self.metrics:
            raise refusal(
                "unused-metric",
                f"role_metrics must come with the metric {DECOUPLED}. Got {', '.join(self.metrics)}. "
                "Add it, or leave role_metrics out.",
            )
        named = (self.metrics[0], *self.role_metrics.values()) if self.contexts else ()
        whole = [name for name in named if name == AUTO or not SCORERS[name].by_context]
        if whole:
            split = ", ".join(name for name, entry in SCORERS.items() if entry.by_context)
            raise refusal(
                "metric-not-offered", f"Contexts must be planned by one of {split}. Got {whole[0]!r}."
            )
        caches = self.kv_cache or any(is_cache(scheme) for scheme in self.pins.values())
        if caches and DECOUPLED in self.metrics:
            raise refusal(
                "metric-not-offered",
                f"{DECOUPLED} must decide weights alone: caches have no role. Got kv_cache. Leave it out.",
            )
        if DECOUPLED in self.role_metrics.values():
            raise refusal(
                "unknown-metric", f"A role must have a metric of its own. Got {DECOUPLED}. Pick another one."
            )
        return self

    @model_validator(mode="after")
    def _named_metrics(self) -> JobRequest:
        """Objectives and limits may name metrics that the job measures."""
        measured = (*self.metrics, self.refine_metric)
        fault = objective_fault(self.objective, self.metrics)
        if fault is not None:
            raise refusal("invalid-objective", fault)
        paired = (self.interactions and self.refine_metric is None) or set(INTERACTIONS) & set(self.metrics)
        if isinstance(parse_objective(self.objective), Quadratic) and not paired:
            raise refusal(
                "invalid-objective",
                "The objective quadratic must have interactions, which this search does not measure. Got"
                f" interactions {self.interactions}, refine_metric {self.refine_metric}. Leave both out.",
            )
        for limit in parse_limits((*self.budgets, *self.limits)):
            split = self.contexts is not None and self.contexts.plans == "each"
            if limit.resource in SCORERS and (split or limit.resource not in measured):
                raise refusal(
                    "invalid-budget",
                    f"A limit on a metric must be on one of the search: {', '.join(self.metrics)}, and not"
                    f" beside a plan per context. Got {limit.resource!r}. Add it to the metrics, or drop it.",
                )
        return self

    @model_validator(mode="after")
    def _seen(self) -> JobRequest:
        asked = (*self.metrics, self.refine_metric, *self.role_metrics.values())
        named = [name for name in asked if name not in (AUTO, None)]
        for blind in (unseen(str(name), self.rounding) for name in named):
            if blind is not None:
                raise refusal("metric-not-offered", blind)
        return self

    @model_validator(mode="after")
    def _decided_caches(self) -> JobRequest:
        """Caches are pinned and forbidden where they are decided, and a menu decides what a deployment would
        assume.
        """
        forbidden = [(key, scheme) for key, schemes in self.forbid.items() for scheme in schemes]
        decided = [pair for pair in (*self.pins.items(), *forbidden) if is_cache(pair[1])]
        if decided and not self.kv_cache:
            name, scheme = decided[0]
            raise refusal(
                "missing-cache-types",
                f"The scheme of a cache must come with a menu of cache types. Got {name!r}: {scheme!r} and no"
                ' kv_cache. Add kv_cache, for example ["int8"].',
            )
        if self.kv_cache and self.deployment is not None and self.deployment.kv_cache not in FULL_TYPES:
            raise refusal(
                "repeated-value",
                "A cache that a menu leaves full must be one of"
                f" {', '.join(FULL_TYPES)}. Got {self.deployment.kv_cache!r} in the deployment. Put it into"
                " kv_cache, and leave it out of the deployment.",
            )
        return self

    @property
    def rounding(self) -> tuple[str, ...]:
        """Every scheme that may be measured: of the menu, of pins, of caches."""
        return (*self.schemes, *self.pins.values(), *map(cache_scheme, self.kv_cache))

    @property
    def takes_part(self) -> tuple[str, ...]:
        """The patterns of `include`, and every pin that names a layer outright: a pinned head takes part."""
        pins = [name for name, scheme in self.pins.items() if not is_cache(scheme)]
        named = [pattern for pattern in pins if not WILDCARDS & set(pattern)]
        return tuple(dict.fromkeys((*self.include, *named)))


class Webhook(WireModel):
    """Who is told, by a signed POST, that a job has ended."""

    url: WebhookUrl
    secret: WebhookSecret


class SubmitRequest(JobRequest):
    """A search to be queued, by when it must have ended, and who is told of its end."""

    deadline: Deadline = None
    webhook: Webhook | None = Field(default=None, description="Told of the job's end; see docs/events.md.")


class ResumeRequest(WireModel):
    """What a resumed job has of its own."""

    deadline: Deadline = None
    webhook: Webhook | None = Field(default=None, description="Told of the new job's end.")


class CheckpointRequest(WireModel):
    """What a plan's weights are written for."""

    consumer: Annotated[str, AfterValidator(checkpoint_consumer), Field(description="Who loads them.")]
    force: bool = Field(
        default=False,
        description="Write them although the plan was made with other versions of quantizers; told in the"
        " provenance.",
    )


SampledPlans = Annotated[
    Integer,
    Field(ge=8, le=1000, description="So many random plans per budget, and so many near the optimum."),
]


class CorrelationRequest(WireModel):
    """How well the metrics of a search rank plans that are measured."""

    plans: SampledPlans = 60
    budgets: Budgets | None = Field(default=None, description="Those of the search when left out.")
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=32), AfterValidator(distinct)] | None = (
        Field(
            default=None,
            description="Measured where they are not stored; every stored one when left out.",
        )
    )


class LocalJobRequest(JobRequest):
    """A search of this machine's own user, who may run his own code in it; never read from HTTP."""

    user_metric: Text | None = None


class CorrelationJob(WireModel):
    """What a job of correlations works on; `job` is the search that it was asked of, if any."""

    search: LocalJobRequest
    plans: SampledPlans = 60
    every_stored: bool = False
    job: Name | None = None

    @model_validator(mode="after")
    def _of_all_samples(self) -> CorrelationJob:
        """What is correlated is one metric's score of every layer on all samples, at budgets."""
        if not self.search.budgets:
            raise refusal(
                "invalid-budget",
                "Correlations must be at a budget. Got a search with targets alone. Name budgets.",
            )
        got = [DECOUPLED] * (DECOUPLED in self.search.metrics) + ["contexts"] * (
            self.search.contexts is not None
        )
        if got:
            raise refusal(
                "metric-not-offered",
                "Correlations must be of metrics that score every layer on all samples. "
                f"Got a search with {' and '.join(got)}. Name other metrics, or ask a search without.",
            )
        return self


class PlansRequest(WireModel):
    """An instant re-solve from stored scores; limits, pins, ties and so on that are left out are
    those of the job.
    """

    budgets: Budgets
    limits: Limits | None = None
    pins: Pins | None = None
    ties: Ties | None = None
    protect: Protect | None = None
    forbid: Forbid | None = None
    role_limits: RoleLimits | None = None
    metric: Metric | None = Field(
        default=None, description="A metric of the job; the one that decides when left out."
    )
    context: Name | None = Field(
        default=None, description="For a job with a plan per context: whose scores to plan by."
    )
    time_limit_seconds: Annotated[Number, Field(gt=0, le=60, description="Seconds for one solve.")] = 10.0
    gap: Gap = 1e-9
    objective: ObjectiveText | None = Field(
        default=None, description="See GET /v1/objectives; the job's own when left out."
    )
    runtime: Runtime | None = Field(
        default=None, description='Its rules hold too; the job\'s own when left out, "generic" for none.'
    )
    latency: LatencySource | None = None
    energy: EnergySource | None = None
    deployment: Deployment | None = None
    device_profile: DeviceProfile | None = None
