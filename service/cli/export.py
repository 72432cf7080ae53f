"""`bitplan export`: a plan as the files that a runtime reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quant.catalog import EXPORTERS
from quant.digest import folder_digest
from quant.export.front import PROVENANCE_FILE
from quant.export.front import export as export_files
from quant.export.protocol import Deployment
from quant.plan import Plan, parse_plan
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, print_json
from service.consumers import require_consumer
from service.model_facts import model_facts


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")],
    to: Annotated[str, typer.Option("--to", help=f"The consumer: {', '.join(EXPORTERS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the files.")],
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The model's folder; known already if it was planned on this machine."),
    ] = None,
    force: options.Force = False,
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
) -> None:
    """Write the plan as the configuration that a runtime reads, or say which layer breaks which rule."""
    with exits(as_json=as_json):
        require_consumer(to, EXPORTERS)
        wanted = parse_plan(plan.read_text(encoding="utf-8"))
        folder = model or _known_folder(wanted, data_dir)
        facts = replace(model_facts(folder, wanted), digest=folder_digest(folder)[0])
        files = export_files(to, Deployment(wanted, facts), force=force)
        _write(files, output)
        switches = json.loads(files[PROVENANCE_FILE]).get("switches")
        if as_json:
            found = {"output": str(output), "files": sorted(files)}
            print_json(found if switches is None else {**found, "switches": switches})
        else:
            console().print(f"wrote {', '.join(sorted(files))} to {output}")
            if switches is not None:
                console().print(f"run it with {switches}: no file asks for the caches")


def _known_folder(plan: Plan, data_dir: Path | None) -> Path:
    """The folder of the plan's own model, if this machine planned it."""
    from service.db.repositories import models
    from service.local import Local, local_settings

    if plan.digests.model is not None:
        with Local(local_settings(data_dir)) as local, local.database.read() as session:
            for record in models.list_by_digest(session, plan.digests.model):
                if record.source["kind"] == "local" and Path(record.source["folder"]).is_dir():
                    return Path(record.source["folder"])
    raise ValueError(
        "The plan's model must be known to name its modules. Got a plan of a model that was not planned here."
        " Pass --model MODEL_DIR."
    )


def _write(files: dict[str, bytes], output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"Output folder must be new or empty. Got {str(output)!r}. Name another one.")
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
