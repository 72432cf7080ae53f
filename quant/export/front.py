"""Exports by consumer name: lint, write, and say where it comes from. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from quant.catalog import EXPORTERS, Exporter
from quant.digest import canonical_json
from quant.export.protocol import Deployment, ExportError, ExportRefused, Violation
from quant.export.rules import no_additions

PROVENANCE_FILE = "bitplan_provenance.json"


@dataclass(frozen=True)
class ExportProvenance:
    """What an export was made from. `bytes` are the plan's, `consumer_bytes` what the consumer stores."""

    schema: str
    consumer: str
    plan: str
    model: str | None
    calibration: str | None
    scores: str | None
    bytes: int
    consumer_bytes: int


def exporter_of(consumer: str) -> Exporter:
    """The catalog entry. Raises ExportError for an unknown consumer."""
    if consumer not in EXPORTERS:
        raise ExportError(
            f"Consumer must be one of {', '.join(EXPORTERS)}. Got {consumer[:60]!r}. Pick one of them."
        )
    return EXPORTERS[consumer]


def lint(consumer: str, deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the consumer's rules, in the order of rules and layers.

    No consumer's files have a place for what a quantizer stores beside its format.
    """
    if not deployment.quantized:
        name, layer = next(iter(deployment.plan.layers.items()))
        return (Violation(name, "at least one module must be quantized", f"{layer.scheme} everywhere"),)
    return (*no_additions(deployment), *exporter_of(consumer).load().lint(deployment))


def export(consumer: str, deployment: Deployment) -> dict[str, bytes]:
    """File name -> content, provenance included; equal inputs give equal bytes.

    Raises ExportRefused with every violation, ExportError for an unknown consumer.
    """
    module = exporter_of(consumer).load()
    violations = lint(consumer, deployment)
    if violations:
        raise ExportRefused(consumer, violations)
    plan = deployment.plan
    provenance = ExportProvenance(
        schema="bitplan.export/1",
        consumer=consumer,
        plan=plan.digest,
        model=plan.digests.model,
        calibration=plan.digests.calibration,
        scores=plan.digests.scores,
        bytes=plan.totals.bytes,
        consumer_bytes=module.stored_bytes(deployment),
    )
    return {**module.files(deployment), PROVENANCE_FILE: canonical_json(asdict(provenance)).encode()}
