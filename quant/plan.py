"""Plans: one scheme per layer, with exact sizes and the digests of everything the plan was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from math import prod
from typing import Any

from quant.catalog import CORRECTIONS
from quant.costs import bits_per_weight
from quant.digest import canonical_json, digest
from quant.kv_cache import FULL, SMALLER_TYPES, cache_scheme
from quant.layers import DTYPE_BITS, read_matrix
from quant.reading import Node, ReadError
from quant.schemes import SchemeError, parse_scheme
from quant.storage import Matrix

SCHEMA = "bitplan.plan/1"
STATUSES = ("optimal", "feasible")
OPTIONAL = ("runtime", "latency", "calibration", "corrections", "decided_by", "kv_cache", "objective")
"""Fields that a document leaves out where there is nothing to say."""


class PlanError(ValueError):
    """A plan that cannot be built, read, or trusted."""


@dataclass(frozen=True)
class PlanLayer:
    """The decision for one layer. `shape` is the weight's, `matrix` what the format saw.

    `dtype` is the type that the model stores the weight in, None in documents that do not say.
    """

    scheme: str
    spelled: str
    weight_bits: int
    bytes: int
    parameters: int
    shape: tuple[int, ...]
    matrix: Matrix
    op: str
    aliases: tuple[str, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over the layers that take part; `checkpoint_bytes` also counts everything else in the model.

    `bits_per_weight` is 8 * bytes / parameters: every stored bit, scales and zero points too.
    """

    parameters: int
    bytes: int
    bits_per_weight: float
    checkpoint_bytes: int
    bops: int | None


@dataclass(frozen=True)
class Digests:
    """What the plan was made from; None where that input was not used."""

    model: str | None = None
    calibration: str | None = None
    scores: str | None = None
    settings: str | None = None


@dataclass(frozen=True)
class Certificate:
    """What the solver proved: status optimal or feasible, objective, proven bound, relative gap."""

    status: str
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Calibration:
    """How the calibration data of `digests.calibration` were read: with them and the model, quantizers that
    need inputs give the very weights that were measured.
    """

    task: str
    samples: int
    sequence_length: int
    seed: int
    batch_size: int
    device: str

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Calibration:
        """The members of a larger mapping, a job request for example."""
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Plan:
    """A bit-width plan. Equal inputs give equal bytes of `plan_json`: no times, no identifiers.

    `quantizers` are the versions of the quantizers in use, `predicted` the value of `metric` that the score
    model expects, `source` how the plan was found, `budget` the limits it was solved under, as written.
    `runtime` names the rules that the plan keeps, `latency` says where its latencies came from ("table",
    "measured", "roofline:h100"), `calibration` how the data were read if anything needs any, `corrections`
    the versions of those that change other tensors than the layers' weights, `decided_by` the metric of each
    layer where metrics differ from layer to layer, `kv_cache` the type of each attention layer's cache where
    these were decided, `objective` what the certificate is about if not the metric's sum, as written; a
    document leaves out what it has not.
    """

    layers: Mapping[str, PlanLayer]
    totals: Totals
    digests: Digests
    quantizers: Mapping[str, int]
    budget: str
    metric: str | None
    predicted: float | None
    certificate: Certificate
    source: str
    runtime: str | None = None
    latency: str | None = None
    calibration: Calibration | None = None
    corrections: Mapping[str, int] | None = None
    decided_by: Mapping[str, str] | None = None
    kv_cache: Mapping[str, str] | None = None
    objective: str | None = None

    @property
    def weights(self) -> dict[str, str]:
        """Layer name -> scheme name."""
        return {name: layer.scheme for name, layer in self.layers.items()}

    @property
    def assignment(self) -> dict[str, str]:
        """Every decision: layer name -> scheme name, attention layers with those of their caches too."""
        caches = {name: cache_scheme(kind) for name, kind in (self.kv_cache or {}).items()}
        return self.weights | caches

    def as_json(self) -> dict[str, Any]:
        """The document as plain values."""
        layers = {name: _layer_json(layer) for name, layer in self.layers.items()}
        fields = _plain(asdict(replace(self, layers={}))) | {"layers": layers}
        given = {name: value for name, value in fields.items() if name not in OPTIONAL or value is not None}
        return {"schema": SCHEMA, **given}

    @property
    def needs_calibration(self) -> tuple[str, ...]:
        """The layers of which something is chosen from calibration data: weights, or activations' scales."""
        return tuple(
            name for name, layer in self.layers.items() if parse_scheme(layer.scheme).needs_calibration
        )

    @property
    def activations(self) -> dict[str, str]:
        """Layer name -> activation format, for the layers whose inputs are rounded."""
        schemes = ((name, parse_scheme(layer.scheme)) for name, layer in self.layers.items())
        return {name: scheme.activation.name for name, scheme in schemes if scheme.activation is not None}

    @property
    def reads_calibration(self) -> bool:
        """Whether applying the plan takes its calibration data, for quantizers or for corrections."""
        return bool(self.corrections or self.needs_calibration)

    def other_model(self, model: str) -> str | None:
        """Why weights with the digest `model` are not the plan's own, or None."""
        if self.digests.model == model:
            return None
        made_for = self.digests.model or "a model without a digest"
        return f"Plan must be made for this model. Got a plan for {made_for}, and the model {model}."

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return digest(self.as_json())


def plan_json(plan: Plan) -> str:
    """The document as canonical JSON (sorted keys, no spaces); `parse_plan` reads it back."""
    return canonical_json(plan.as_json())


def plan_schema() -> dict[str, Any]:
    """The published JSON Schema of plan documents."""
    text = files("quant").joinpath("schemas", "plan.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _layer_json(layer: PlanLayer) -> dict[str, Any]:
    fields = dict(vars(layer))
    for name in ("shape", "matrix", "aliases"):
        fields[name] = list(fields[name])
    if layer.dtype is None:
        del fields["dtype"]
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def parse_plan(text: str | bytes) -> Plan:
    """Read a plan document and check that its sizes are what its schemes store.

    Raises PlanError that names the place and what it must be.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        return plan_from_json(value)
    except (ReadError, SchemeError) as error:
        raise PlanError(f"Plan is not valid: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"Plan must be a JSON document. Got {error}. Export the plan again.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise PlanError("Plan must name every field once. Got a repeated field. Export the plan again.")
    return value


def plan_from_json(value: Any) -> Plan:
    """Inverse of `Plan.as_json`. Raises ReadError, SchemeError or PlanError that names the place."""
    root = Node(value)
    schema = root.mapping().get("schema")
    if schema != SCHEMA:
        raise PlanError(f"Plan schema must be {SCHEMA!r}. Got {schema!r:.80}. Export the plan again.")
    names = [name for name in Plan.__dataclass_fields__ if name not in OPTIONAL or name in root.mapping()]
    fields = root.fields("schema", *names)
    plan = Plan(
        layers={name: _read_layer(node) for name, node in fields["layers"].members()},
        totals=_read_totals(fields["totals"]),
        digests=_read_digests(fields["digests"]),
        quantizers={name: node.integer(1) for name, node in fields["quantizers"].members()},
        budget=fields["budget"].text(),
        metric=fields["metric"].optional_text(),
        predicted=fields["predicted"].optional_number(),
        certificate=_read_certificate(fields["certificate"]),
        source=fields["source"].text(),
        runtime=fields["runtime"].text() if "runtime" in fields else None,
        latency=fields["latency"].text() if "latency" in fields else None,
        calibration=_read_calibration(fields["calibration"]) if "calibration" in fields else None,
        corrections=_read_corrections(fields["corrections"]) if "corrections" in fields else None,
        decided_by=_read_deciding(fields["decided_by"]) if "decided_by" in fields else None,
        kv_cache=_read_kv_cache(fields["kv_cache"]) if "kv_cache" in fields else None,
        objective=fields["objective"].text() if "objective" in fields else None,
    )
    _check_totals(plan)
    return plan


def _read_layer(node: Node) -> PlanLayer:
    told = "dtype" in node.mapping()
    fields = node.fields(*(name for name in PlanLayer.__dataclass_fields__ if told or name != "dtype"))
    layer = PlanLayer(
        scheme=fields["scheme"].text(),
        spelled=fields["spelled"].text(),
        weight_bits=fields["weight_bits"].integer(1),
        bytes=fields["bytes"].integer(1),
        parameters=fields["parameters"].integer(1),
        shape=tuple(item.integer(1) for item in fields["shape"].items()),
        matrix=read_matrix(fields["matrix"]),
        op=fields["op"].text(),
        aliases=tuple(item.text() for item in fields["aliases"].items()),
        dtype=fields["dtype"].text() if told else None,
    )
    if told and layer.dtype not in DTYPE_BITS:
        raise fields["dtype"].error(f"one of {', '.join(DTYPE_BITS)}")
    scheme = parse_scheme(layer.scheme)
    expected = {
        "scheme": scheme.name,
        "spelled": scheme.spelled,
        "weight_bits": scheme.weight_bits,
        "bytes": scheme.storage(layer.matrix).bytes,
        "parameters": prod(layer.shape),
        "matrix": layer.matrix if prod(layer.matrix) == layer.parameters else "the sides of the shape",
    }
    for name, value in expected.items():
        if getattr(layer, name) != value:
            raise fields[name].error(
                f"{value!r}, which follows from the other fields", "Export the plan again."
            )
    return layer


def _read_totals(node: Node) -> Totals:
    fields = node.fields(*Totals.__dataclass_fields__)
    return Totals(
        parameters=fields["parameters"].integer(1),
        bytes=fields["bytes"].integer(1),
        bits_per_weight=fields["bits_per_weight"].number(),
        checkpoint_bytes=fields["checkpoint_bytes"].integer(1),
        bops=fields["bops"].optional_integer(),
    )


def _read_digests(node: Node) -> Digests:
    fields = node.fields(*Digests.__dataclass_fields__)
    for field in fields.values():
        text = field.optional_text()
        if text is not None and (len(text) != 64 or set(text) - set("0123456789abcdef")):
            raise field.error("64 lowercase hexadecimal digits or null")
    return Digests(**{name: field.value for name, field in fields.items()})


def _read_certificate(node: Node) -> Certificate:
    fields = node.fields(*Certificate.__dataclass_fields__)
    if fields["status"].text() not in STATUSES:
        raise fields["status"].error(f"one of {', '.join(STATUSES)}")
    return Certificate(
        status=fields["status"].text(),
        objective=fields["objective"].optional_number(),
        bound=fields["bound"].optional_number(),
        gap=fields["gap"].optional_number(),
    )


def _read_calibration(node: Node) -> Calibration:
    fields = node.fields(*Calibration.__dataclass_fields__)
    return Calibration(
        task=fields["task"].text(),
        samples=fields["samples"].integer(1),
        sequence_length=fields["sequence_length"].integer(1),
        seed=fields["seed"].integer(),
        batch_size=fields["batch_size"].integer(1),
        device=fields["device"].text(),
    )


def _read_corrections(node: Node) -> dict[str, int]:
    found = {name: version.integer(1) for name, version in node.members()}
    if not found or set(found) - set(CORRECTIONS):
        raise node.error(f"versions of some of {', '.join(CORRECTIONS)}")
    return found


def _read_deciding(node: Node) -> dict[str, str]:
    return {layer: metric.text() for layer, metric in node.members()}


def _read_kv_cache(node: Node) -> dict[str, str]:
    found = {name: kind.text() for name, kind in node.members()}
    if not found:
        raise node.error("the type of some attention layer's cache, or left out")
    for name, kind in node.members():
        if found[name] not in (FULL, *SMALLER_TYPES):
            raise kind.error(f"one of {', '.join((FULL, *SMALLER_TYPES))}")
    return found


def _check_totals(plan: Plan) -> None:
    if not plan.layers:
        raise PlanError("Plan must hold at least one layer. Got none. Export the plan again.")
    if plan.decided_by is not None and plan.decided_by.keys() != plan.layers.keys():
        raise PlanError("Plan decided_by must name every layer once. Got others. Export the plan again.")
    totals, layers = plan.totals, plan.layers.values()
    parameters = sum(layer.parameters for layer in layers)
    stored = sum(layer.bytes for layer in layers)
    found = (totals.parameters, totals.bytes, totals.bits_per_weight)
    expected = (parameters, stored, bits_per_weight(stored, parameters))
    if found != expected or totals.checkpoint_bytes < stored:
        raise PlanError(
            "Plan totals (parameters, bytes, bits_per_weight) must be the sums over its layers:"
            f" {expected}. Got {found}. Export the plan again."
        )
