"""Exports by consumer name: lint, write, and say where it comes from. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from quant.catalog import EXPORTERS, Exporter, consumer_fault
from quant.digest import canonical_json
from quant.export.protocol import Deployment, ExportError, ExportRefused, Violation
from quant.export.rules import no_additions, one_cache
from quant.kv_cache import FULL

PROVENANCE_FILE = "bitplan_provenance.json"


class OtherModel(ExportError):  # noqa: N818 - says what happened
    """Weights that the plan was not made for."""


@dataclass(frozen=True)
class ExportProvenance:
    """What an export was made from. `bytes` are the plan's, `consumer_bytes` what the consumer stores.

    `model` is the digest of the weights it is for; `planned_for`, `calibration` and `scores` are the plan's
    digests. `mismatches` say in words what was overridden: another model of the same shapes, a fine-tune
    say; `forced` says that there were some. `switches` are what the consumer's command must be given besides,
    None where the files say all.
    """

    schema: str
    consumer: str
    plan: str
    model: str | None
    planned_for: str | None
    calibration: str | None
    scores: str | None
    bytes: int
    consumer_bytes: int
    forced: bool
    mismatches: tuple[str, ...]
    switches: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values. `switches` is left out where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "switches" or value}


def exporter_of(consumer: str) -> Exporter:
    """The catalog entry. Raises ExportError for an unknown consumer."""
    fault = consumer_fault(consumer, EXPORTERS)
    if fault:
        raise ExportError(fault)
    return EXPORTERS[consumer]


def lint(consumer: str, deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the consumer's rules, in the order of rules and layers.

    No consumer's files have a place for what a quantizer stores beside its format, or for caches that differ.
    """
    if not deployment.quantized:
        name, layer = next(iter(deployment.plan.layers.items()))
        return (Violation(name, "at least one module must be quantized", f"{layer.scheme} everywhere"),)
    entry = exporter_of(consumer)
    with _library_of(entry):
        return (
            *no_additions(deployment),
            *one_cache(deployment, (*entry.caches, *entry.cache_switches)),
            *entry.load().lint(deployment),
        )


def export(consumer: str, deployment: Deployment, *, force: bool = False) -> dict[str, bytes]:
    """File name -> content, provenance included; equal inputs give equal bytes.

    Raises OtherModel when the plan was made for other weights (unless `force`; the provenance then says so),
    ExportRefused with every violation, ExportError for an unknown consumer.
    """
    entry = exporter_of(consumer)
    module = entry.load()
    violations = lint(consumer, deployment)
    if violations:
        raise ExportRefused(consumer, violations)
    plan, weights = deployment.plan, deployment.model.digest or deployment.plan.digests.model
    other = None if weights is None else plan.other_model(weights)
    if other is not None and not force:
        raise OtherModel(
            f"{other} Pass the plan's own model, or force it for a fine-tune of the same shapes."
        )
    provenance = ExportProvenance(
        schema="bitplan.export/2",
        consumer=consumer,
        plan=plan.digest,
        model=weights,
        planned_for=plan.digests.model,
        calibration=plan.digests.calibration,
        scores=plan.digests.scores,
        bytes=plan.totals.bytes,
        consumer_bytes=module.stored_bytes(deployment),
        forced=other is not None,
        mismatches=() if other is None else (other,),
        switches=entry.cache_switches.get(deployment.cache or FULL),
    )
    with _library_of(entry):
        files = module.files(deployment)
    return {**files, PROVENANCE_FILE: canonical_json(provenance.as_json()).encode()}


@contextmanager
def _library_of(entry: Exporter) -> Iterator[None]:
    """Say which library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Exporting to {entry.name} must have its library. Got no module {error.name!r}."
            " Install bitplan[exports]."
        ) from error
