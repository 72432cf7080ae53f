"""From an assignment of schemes to a plan with every size counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from quant.catalog import CORRECTIONS
from quant.costs import bits_per_weight, bops
from quant.kv_cache import FULL, SMALLER_TYPES, cache_type
from quant.layers import Inventory, Layer
from quant.lint import lint
from quant.plan import Calibration, Certificate, Digests, Plan, PlanError, PlanLayer, Totals
from quant.runtime_rules import Runtime
from quant.runtimes import RUNTIMES
from quant.schemes import Scheme, parse_scheme
from quant.storage import Matrix


def build_plan(
    inventory: Inventory,
    assignment: Mapping[str, str | Scheme],
    *,
    digests: Digests,
    budget: str = "",
    metric: str | None = None,
    predicted: float | None = None,
    certificate: Certificate,
    source: str,
    runtime: str | None = None,
    latency: str | None = None,
    calibration: Calibration | None = None,
    corrections: Collection[str] = (),
    decided_by: Mapping[str, str] | None = None,
    kv_cache: Mapping[str, str] | None = None,
    objective: str | None = None,
) -> Plan:
    """A plan that gives every layer of the inventory its scheme, with all sizes counted.

    Raises PlanError when a layer has no scheme, a name is no layer, a format refuses a layer, or `runtime`
    (a key of RUNTIMES) cannot run the plan. `calibration` is kept if a quantizer or one of the
    `corrections` (keys of CORRECTIONS) needs it. `kv_cache` are types by attention layer.
    """
    schemes = _complete(inventory, assignment)
    counted = _Counted()
    layers = {layer.name: counted.decide(layer, schemes[layer.name]) for layer in inventory.layers}
    stored = sum(layer.bytes for layer in layers.values())
    plan = Plan(
        layers=layers,
        totals=Totals(
            parameters=inventory.parameters,
            bytes=stored,
            bits_per_weight=bits_per_weight(stored, inventory.parameters),
            checkpoint_bytes=inventory.other_bytes + stored,
            bops=_total_bops(inventory, schemes),
        ),
        digests=digests,
        quantizers={n: version for s in schemes.values() for n, version in s.quantizers.items()},
        budget=budget,
        metric=metric,
        predicted=_float(predicted),
        certificate=Certificate(
            certificate.status,
            _float(certificate.objective),
            _float(certificate.bound),
            _float(certificate.gap),
        ),
        source=source,
        runtime=runtime,
        latency=latency,
        calibration=calibration
        if corrections or any(s.needs_calibration for s in schemes.values())
        else None,
        corrections={n: CORRECTIONS[n].version for n in sorted(corrections)} or None,
        decided_by=decided_by or None,
        kv_cache={name: cache_type(kind, (FULL, *SMALLER_TYPES)) for name, kind in (kv_cache or {}).items()}
        or None,
        objective=objective,
    )
    if runtime is not None:
        _require_runnable(plan, RUNTIMES[runtime])
    return plan


def _require_runnable(plan: Plan, runtime: Runtime) -> None:
    violations = lint(plan, runtime)
    if violations:
        first = violations[0]
        raise PlanError(
            f"Plan must be one that {runtime.name} runs. Got {first.layer}: {first.rule}"
            f" ({len(violations)} violations). Solve with the runtime's rules."
        )


def _complete(inventory: Inventory, assignment: Mapping[str, str | Scheme]) -> dict[str, Scheme]:
    names = [layer.name for layer in inventory.layers]
    for name in sorted(assignment.keys() - set(names)):
        close = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        raise PlanError(
            f"Plan must name layers of the inventory. Got {name!r}. Names are like {', '.join(close)}."
        )
    missing = [name for name in names if name not in assignment]
    if missing:
        raise PlanError(
            f"Plan must give every layer a scheme. Got none for {', '.join(missing[:3])}"
            f" ({len(missing)} in all). Add them, or exclude them from the inventory."
        )
    read = {value: scheme_of(value) for value in dict.fromkeys(assignment.values())}
    return {name: read[assignment[name]] for name in names}


def scheme_of(value: str | Scheme) -> Scheme:
    """A scheme from its name or itself."""
    return value if isinstance(value, Scheme) else parse_scheme(value)


class _Counted:
    """Names of schemes and stored bytes, each found once: many layers share both scheme and shape."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[str, str, int]] = {}
        self._bytes: dict[tuple[int, Matrix], int] = {}

    def decide(self, layer: Layer, scheme: Scheme) -> PlanLayer:
        """The decision for a layer. Raises PlanError where the scheme refuses it."""
        refusal = scheme.refuses(layer)
        if refusal:
            raise PlanError(
                f"Scheme must be offered for its layer. Got {scheme.name} for {layer.name}: {refusal}."
            )
        key = id(scheme)
        if key not in self._names:
            self._names[key] = scheme.name, scheme.spelled, scheme.weight_bits
        if (key, layer.matrix) not in self._bytes:
            self._bytes[key, layer.matrix] = scheme.storage(layer.matrix).bytes
        name, spelled, bits = self._names[key]
        return PlanLayer(
            scheme=name,
            spelled=spelled,
            weight_bits=bits,
            bytes=self._bytes[key, layer.matrix],
            parameters=layer.parameters,
            shape=layer.weight_shape,
            matrix=layer.matrix,
            op=layer.op,
            aliases=layer.aliases,
            dtype=layer.dtype,
        )


def _total_bops(inventory: Inventory, schemes: Mapping[str, Scheme]) -> int | None:
    counts = [bops(layer, schemes[layer.name]) for layer in inventory.layers]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _float(value: float | None) -> float | None:
    """Numbers of a plan are floats, so that reading a document back gives the same bytes."""
    return None if value is None else float(value)
