"""Checkpoints by consumer name: what will be written, and writing it whole or not at all. No torch."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant.catalog import CHECKPOINTS, CORRECTIONS, QUANTIZERS, Checkpoint, consumer_fault
from quant.checkpoints.corrected import corrected_source
from quant.checkpoints.protocol import (
    PLAN_FILE,
    PROVENANCE_FILE,
    CheckpointError,
    Layout,
    OutputFile,
    Provenance,
    Wrote,
)
from quant.checkpoints.source import Source
from quant.digest import canonical_json
from quant.export.protocol import Deployment, ExportRefused, ModelFacts, Module, Violation
from quant.plan import Plan, plan_json

if TYPE_CHECKING:
    from torch import Tensor

    from quant.apply import InputsOf


@dataclass(frozen=True)
class Written:
    """A checkpoint that lies there: where it comes from, and its files."""

    provenance: Provenance
    layout: Layout


def apply_plan(
    model_dir: Path | str,
    plan: Plan,
    out_dir: Path | str,
    *,
    force: bool = False,
    inputs: InputsOf | None = None,
    corrected: Mapping[str, Tensor] | None = None,
) -> Written:
    """A model folder with the plan's weights in it, dequantized: `write` for the consumer `pytorch`.

    That consumer asks nothing about modules that the plan leaves alone, so no model is built.
    """
    source = Source.open(model_dir)
    deployment = plan_deployment(plan, source)
    return write("pytorch", source, deployment, out_dir, force=force, inputs=inputs, corrected=corrected)


def plan_deployment(plan: Plan, source: Source) -> Deployment:
    """A plan with the modules that it names, for consumers that ask about no others."""
    named = [(path, layer.op) for name, layer in plan.layers.items() for path in (name, *layer.aliases)]
    return Deployment(plan, ModelFacts(source.config, tuple(Module(*pair) for pair in named)))


def checkpoint_of(consumer: str) -> Checkpoint:
    """The catalog entry. Raises CheckpointError for an unknown consumer."""
    fault = consumer_fault(consumer, CHECKPOINTS)
    if fault:
        raise CheckpointError(fault)
    return CHECKPOINTS[consumer]


def lint(consumer: str, deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of the consumer's rules, in the order of rules and layers."""
    return checkpoint_of(consumer).load().lint(deployment)


def provenance(consumer: str, source: Source, deployment: Deployment) -> Provenance:
    """Where the checkpoint of this plan and these weights comes from; equal inputs give equal values."""
    plan = deployment.plan
    found = tuple(_mismatches(plan, source.digest))
    return Provenance(
        schema="bitplan.provenance/2",
        consumer=consumer,
        plan=plan.digest,
        model=source.digest,
        planned_for=plan.digests.model,
        calibration=plan.digests.calibration,
        scores=plan.digests.scores,
        tensors=len(source.stored(plan)),
        activations=plan.activations,
        forced=bool(found),
        mismatches=found,
        kv_cache=plan.kv_cache,
    )


def layout(consumer: str, source: Source, deployment: Deployment, *, force: bool = False) -> Layout:
    """The dry run: every file with its exact size; nothing is quantized or written.

    Raises ExportRefused with every violation, and CheckpointError when the plan was made for another model
    or with other quantizer versions (unless `force`) or its layers are not the source's.
    """
    entry = checkpoint_of(consumer)
    module = entry.load()
    violations = module.lint(deployment)
    if violations:
        raise ExportRefused(consumer, violations)
    mismatches = provenance(consumer, source, deployment).mismatches
    if mismatches and not force:
        raise CheckpointError(f"{' '.join(mismatches)} Pass the plan's own model, or force it.")
    with _library_of(entry):
        found = module.layout(source, deployment)
    if entry.writes == "file":
        return found
    beside = _beside(consumer, source, deployment)
    told = [OutputFile(name, len(text)) for name, text in beside.items()]
    return Layout((*found.files, *told), found.planned_bytes)


def write(
    consumer: str,
    source: Source,
    deployment: Deployment,
    out: Path | str,
    *,
    force: bool = False,
    inputs: InputsOf | None = None,
    corrected: Mapping[str, Tensor] | None = None,
    wrote: Wrote = lambda _: None,
) -> Written:
    """Write the checkpoint to `out`, a new or empty folder, or a new file; it appears whole or not at all.

    Plan and provenance lie beside a folder's files, and inside a file. `inputs` gives statistics of the
    layers in `plan.needs_calibration`, from the plan's own calibration data read as the plan says;
    `corrected` are the tensors that the plan's corrections give on them, by their names in the model.

    Raises what `layout` does; CheckpointError when any of these is needed and not given, `out` is in use, or
    the consumer's library is missing; OSError when the disk is too small; NonFinite as its name says.
    """
    entry, place = checkpoint_of(consumer), Path(out)
    plan = deployment.plan
    expected = layout(consumer, source, deployment, force=force)
    require_inputs(plan, given=inputs is not None)
    require_corrected(plan, given=corrected is not None)
    _require_free(place, folder=entry.writes == "folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    _require_space(place.parent, expected)
    partial = place.with_name(f".{place.name}.partial")
    _remove(partial)
    try:
        if entry.writes == "folder":
            partial.mkdir()
        with corrected_source(source, plan, corrected or {}, place.parent) as weights:
            _write(entry, weights, deployment, partial, inputs, wrote)
        _require_as_laid_out(partial, expected)
        if place.is_dir():
            place.rmdir()
        os.replace(partial, place)
    finally:
        _remove(partial)
    return Written(provenance(consumer, source, deployment), expected)


def _write(
    entry: Checkpoint,
    source: Source,
    deployment: Deployment,
    partial: Path,
    inputs: InputsOf | None,
    wrote: Wrote,
) -> None:
    with _library_of(entry):
        entry.load().write(source, deployment, partial, inputs, wrote)
    if entry.writes == "folder":
        for name, content in _beside(entry.name, source, deployment).items():
            (partial / name).write_bytes(content)


@contextmanager
def _library_of(entry: Checkpoint) -> Iterator[None]:
    """Say which library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"Writing for {entry.name} must have its library. Got no module {error.name!r}."
            " Install bitplan[exports]."
        ) from error


def _beside(consumer: str, source: Source, deployment: Deployment) -> dict[str, bytes]:
    told = provenance(consumer, source, deployment)
    return {
        PLAN_FILE: plan_json(deployment.plan).encode(),
        PROVENANCE_FILE: canonical_json(told.as_json()).encode(),
    }


def require_inputs(plan: Plan, *, given: bool) -> None:
    """Raise CheckpointError when the plan needs statistics of inputs that are not given."""
    needing = plan.needs_calibration
    if needing and not given:
        raise CheckpointError(
            f"Plan must be applied with its calibration data. Got none, and {needing[0]} is"
            f" {plan.layers[needing[0]].scheme}, whose quantizer or static activations go by them"
            f" ({len(needing)} such layers). Pass --calibration FILE."
        )


def require_corrected(plan: Plan, *, given: bool) -> None:
    """Raise CheckpointError when the plan's corrections are not given."""
    if plan.corrections and not given:
        raise CheckpointError(
            f"Plan must be applied with its calibration data. Got none, and it has the corrections"
            f" {', '.join(plan.corrections)}, which are found on them. Pass --calibration FILE."
        )


def _mismatches(plan: Plan, model: str) -> Iterator[str]:
    other = plan.other_model(model)
    if other is not None:
        yield other
    for name, version in plan.quantizers.items():
        ours = QUANTIZERS[name].version if name in QUANTIZERS else None
        if version != ours:
            yield f"Plan must use quantizer {name} version {ours}. Got version {version}."
    for name, version in (plan.corrections or {}).items():
        ours = CORRECTIONS[name].version
        if version != ours:
            yield f"Plan must use correction {name} version {ours}. Got version {version}."


def _require_free(out: Path, *, folder: bool) -> None:
    if folder and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"Output folder must be new or empty. Got {str(out)!r}, which is in use. Name another one."
        )
    if not folder and out.exists():
        raise CheckpointError(f"Output file must be new. Got {str(out)!r}, which exists. Name another one.")


def _require_space(folder: Path, expected: Layout) -> None:
    free = shutil.disk_usage(folder).free
    if free < expected.bytes:
        raise OSError(
            errno.ENOSPC,
            f"Disk must have {expected.bytes:,} bytes free for this checkpoint. Got {free:,}."
            " Make room, or write elsewhere",
            str(folder),
        )


def _require_as_laid_out(partial: Path, expected: Layout) -> None:
    """The sizes that were told are those on disk: a checkpoint that differs does not appear."""
    files = sorted(partial.iterdir()) if partial.is_dir() else [partial]
    found = sorted(file.stat().st_size for file in files)
    if found != sorted(file.bytes for file in expected.files):
        raise RuntimeError(f"Files must be as laid out: {expected}. Got {found} bytes in {files}.")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
