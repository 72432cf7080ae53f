"""`bitplan convert`: a pickled checkpoint as safetensors, on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli import options
from service.cli.exits import exits
from service.cli.output import JobProgress, console, print_json


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help="A .bin, .pt, .pth or .ckpt file of tensors, or a folder of shards.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the safetensors.")],
    as_json: options.Json = False,
) -> None:
    """Turn a pickled checkpoint into safetensors, with the same values; nothing in the file can run."""
    with exits(as_json=as_json, interrupted="no folder was written"):
        from quant.conversion import convert as converted

        with JobProgress(quiet=as_json) as bar:

            def show(done: int, total: int) -> None:
                bar({"stage": "converting", "progress": {"done": done, "total": total}})

            facts = converted(source, output, show).as_json()
        if as_json:
            print_json({"output": str(output), **facts})
            return
        told = console()
        told.print(f"wrote {output}: {facts['tensors']:,} tensors, {facts['bytes']:,} bytes", markup=False)
        if not facts["has_config"]:
            told.print(
                "config.json was not beside the weights: add the model's own before you use the folder."
            )
