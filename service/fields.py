"""Types of single members of requests, each with its bound and the words of its refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
)
from pydantic_core import PydanticCustomError

from quant.catalog import CHECKPOINTS, CORRECTIONS
from quant.devices import DeviceError, read_device
from quant.geometry import CACHE_BITS
from quant.kv_cache import cache_type, scheme_name
from quant.runtimes import RUNTIMES
from quant.schemes import parse_scheme
from search.budget import BudgetError, parse_budget, parse_bytes
from search.objectives.catalog import parse_objective
from search.objectives.objective import ObjectiveError
from search.target import TargetError, parse_target
from sensitivity.catalog import AUTO, SCORERS, TASKS
from sensitivity.contexts import without_context
from sensitivity.scorers.metric_decoupled import ROLES
from service.consumers import consumer_fault
from service.hub.reference import BadReference, check_commit, check_folder, check_repository
from service.webhooks.guard import DestinationRefused, parse_destination
from service.webhooks.signing import key_of

LARGEST_SEED = 2**53 - 1
MOST_BUDGETS, MOST_SCHEMES, MOST_PATTERNS, MOST_FILES = 64, 64, 1000, 10_000
MOST_NUMBERS = 2**26
"""In one made sample."""

WILDCARDS = frozenset("*?")

_T = TypeVar("_T")


def refusal(slug: str, message: str) -> PydanticCustomError:
    """A fault with its own slug; pydantic's own kinds have no dash in their names."""
    return PydanticCustomError(slug, "{message}", {"message": message})


def _moment(value: Any) -> datetime | None:
    if value is None:
        return None
    with suppress(ValueError):
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        if moment is not None and moment.tzinfo is not None:
            return moment
    raise refusal(
        "invalid-deadline",
        f"A time must have its zone, as 2026-12-01T18:00:00Z. Got {value!r:.80}. Add Z, or an offset.",
    )


def _scheme(text: str) -> str:
    try:
        return parse_scheme(text).name
    except ValueError as error:
        raise refusal("unknown-scheme", str(error)) from None


def hub_repository(text: str) -> str:
    """The text, if it is owner/name."""
    return _hub(check_repository, text)


def hub_commit(text: str) -> str:
    """The text, if it is a whole commit id."""
    return _hub(check_commit, text)


def hub_folder(text: str) -> str:
    """The text, if it is a folder inside a repository, or ""."""
    return _hub(check_folder, text)


def _hub(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except BadReference as error:
        slug = "moving-revision" if error.member == "commit" else "invalid-hub-id"
        raise refusal(slug, str(error)) from None


def _webhook_url(text: str) -> str:
    try:
        parse_destination(text)
    except DestinationRefused as error:
        raise refusal("invalid-webhook", str(error)) from None
    return text


def _webhook_secret(secret: SecretStr) -> SecretStr:
    try:
        key_of(secret.get_secret_value())
    except ValueError as error:
        raise refusal("invalid-webhook", str(error)) from None
    return secret


WebhookUrl = Annotated[
    str,
    Field(description="Where to POST it: https, a public address.", examples=["https://example.com/hooks"]),
    AfterValidator(_webhook_url),
]
WebhookSecret = Annotated[
    SecretStr,
    Field(description="whsec_ and 24 to 64 random bytes in base64; signs the messages, and is never shown."),
    AfterValidator(_webhook_secret),
]


def any_scheme(text: str) -> str:
    """A scheme of a weight or a cache in canonical spelling."""
    try:
        return scheme_name(text)
    except ValueError as error:
        raise refusal("unknown-scheme", str(error)) from None


def _smaller_cache(text: str) -> str:
    try:
        return cache_type(text)
    except ValueError as error:
        raise refusal("unknown-cache-type", str(error)) from None


def _budget(text: str) -> str:
    try:
        parse_budget(text)
    except BudgetError as error:
        raise refusal("invalid-budget", str(error)) from None
    return text.strip()


def _target(text: str) -> str:
    try:
        return parse_target(text).text
    except TargetError as error:
        raise refusal("invalid-target", str(error)) from None


def _objective(text: str) -> str:
    try:
        return parse_objective(text).text
    except ObjectiveError as error:
        raise refusal("invalid-objective", str(error)) from None


def objective_fault(text: str, metrics: Sequence[str]) -> str | None:
    """Why an objective cannot be solved for with the metrics of a search, or None."""
    for name in parse_objective(text).metrics:
        if without_context(name) not in metrics:
            return (
                f"An objective must name metrics of the search: {', '.join(metrics)}. Got {name!r:.80}."
                " Add it to the metrics of a search, or leave it out."
            )
    return None


def memory_text(text: str) -> str:
    """An amount of memory as it was written. Raises what pydantic reports as invalid-memory-limit."""
    try:
        parse_bytes(text)
    except BudgetError as error:
        raise refusal("invalid-memory-limit", str(error)) from None
    return text.strip()


def one_of(kind: str, names: Any) -> Callable[[str], str]:
    """A validator that knows the catalog when it is called, so that a new entry needs no line here."""

    def check(name: str) -> str:
        if name not in names:
            raise refusal(
                f"unknown-{kind}",
                f"A {kind} must be one of {', '.join(names)}. Got {name!r}. Pick one of them.",
            )
        return name

    return check


def checkpoint_consumer(name: str) -> str:
    """A consumer that takes weights."""
    fault = consumer_fault(name, CHECKPOINTS)
    if fault:
        raise refusal("unknown-consumer", fault)
    return name


def _device(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_device(value).as_json()
    except DeviceError as error:
        raise refusal("invalid-device", str(error)) from None


def _number(value: Any) -> Any:
    """Numbers may come as 64 or 64.0, not as text or booleans."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def distinct(values: list[_T]) -> list[_T]:
    """The values, of which none may repeat."""
    if repeated := next((value for n, value in enumerate(values) if value in values[:n]), None):
        raise refusal("repeated-value", f"Entries must be distinct. Got {repeated!r} twice. Leave one out.")
    return values


Name = Annotated[str, Field(min_length=1, max_length=500)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Scheme = Annotated[Text, AfterValidator(_scheme)]
MemoryText = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(memory_text)]
BudgetText = Annotated[Text, AfterValidator(_budget)]
TargetText = Annotated[Text, AfterValidator(_target)]
Correction = Annotated[Name, AfterValidator(one_of("correction", CORRECTIONS))]
Metric = Annotated[Name, AfterValidator(one_of("metric", SCORERS))]
MetricOrAuto = Annotated[Name, AfterValidator(one_of("metric", (AUTO, *SCORERS)))]
Runtime = Annotated[Name, AfterValidator(one_of("runtime", RUNTIMES))]
CacheType = Annotated[Name, AfterValidator(one_of("kv_cache", CACHE_BITS))]
SmallerCache = Annotated[Name, AfterValidator(_smaller_cache)]
Task = Annotated[Name, AfterValidator(one_of("task", ("auto", *TASKS)))]
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
AnyBudgets = Annotated[
    list[BudgetText],
    Field(
        max_length=MOST_BUDGETS,
        description='Alternatives, each gives a plan: "3.5 bpw", "7 GiB", "bytes<=2 MiB,latency<=12 ms". At'
        " least one, unless there are targets.",
        examples=[["3.5 bpw"]],
    ),
]
Targets = Annotated[
    list[TargetText],
    AfterValidator(distinct),
    Field(
        max_length=MOST_BUDGETS,
        description="Wanted qualities, each gives the smallest plan that keeps it, found and confirmed by"
        ' measuring: "kl<=0.01", "perplexity within 2 %", "accuracy within 0.5 points".',
        examples=[["kl<=0.01"]],
    ),
]
ObjectiveText = Annotated[
    Text,
    AfterValidator(_objective),
    Field(
        description="What plans are solved for: see GET /v1/objectives.",
        examples=["minimax_sum", "lexicographic: output_kl within 1%, weight_error"],
    ),
]
Limits = Annotated[
    list[BudgetText],
    Field(max_length=MOST_BUDGETS, description="Limits that hold together with every budget."),
]
Pins = Annotated[
    dict[Text, Annotated[Text, AfterValidator(any_scheme)]],
    Field(
        max_length=MOST_PATTERNS,
        description="Layer name or pattern -> the scheme it must get; attention layers kv-full, kv-int8 ....",
    ),
]
Forbid = Annotated[
    dict[
        Text,
        Annotated[
            list[Annotated[Text, AfterValidator(any_scheme)]],
            Field(min_length=1, max_length=MOST_SCHEMES),
            AfterValidator(distinct),
        ],
    ],
    Field(
        max_length=MOST_PATTERNS,
        description="Layer name or pattern -> schemes of the menu that it must not get, nor be measured in.",
        examples=[{"*.down_proj": ["w2", "w3"]}],
    ),
]
Ties = Annotated[
    list[Annotated[list[Text], Field(min_length=1, max_length=MOST_PATTERNS)]],
    Field(max_length=MOST_PATTERNS, description="Sets of layer names or patterns that get one scheme."),
]
Protect = Annotated[
    Patterns,
    Field(description="Layers that get the largest scheme of the menu that they may have (patterns)."),
]
RoleLimits = Annotated[
    dict[Text, BudgetText],
    Field(
        max_length=MOST_PATTERNS,
        description="Role, layer or pattern -> a limit on those layers alone, beside every budget.",
        examples=[{"convolution": "5 bpw", "*.attn2.*": "bytes<=20 KiB"}],
    ),
]
RoleName = Annotated[Name, AfterValidator(one_of("role", ROLES))]
RoleMetrics = Annotated[
    dict[Text, Metric],
    Field(
        max_length=MOST_PATTERNS,
        description="For metric_decoupled: role, layer or pattern -> the metric that decides there.",
        examples=[{"cross_attention": "ssim", "*.conv_in": "output_kl"}],
    ),
]
Ratio = Annotated[Number, Field(gt=0, le=1000)]
Deadline = Annotated[
    datetime | None,
    BeforeValidator(_moment),
    Field(
        default=None,
        description="When the job must have ended, with its time zone (2026-12-01T18:00:00Z). One that has "
        "not is expired; its scores are kept.",
        json_schema_extra={"format": "date-time"},
    ),
]
TimeLimit = Annotated[Number, Field(gt=0, le=3600, description="Seconds for one solve.")]
Gap = Annotated[Number, Field(ge=0, le=1, description="Proven relative gap to stop at.")]
