"""`bitplan fetch`: a model of a hub as a folder, at one commit, with every file verified."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, print_json
from service.cli.run import fetched


def fetch(
    hub: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME@COMMIT",
            help="A hub's repository at one commit, all 40 digits; :FOLDER for a part of it.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model's files.")],
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a model from a hub: safetensors, configuration and tokenizer, never code; goes on if it broke."""
    with exits(as_json=as_json, interrupted="run the same command again: it goes on where it stopped"):
        from service.local import local_settings

        if output.exists():
            raise ValueError(
                f"--output must be a new folder. Got {str(output)!r}, which is there. Name another."
            )
        source = fetched(hub, local_settings(data_dir), as_json=as_json)
        _copy(Path(source.location), output)
        names = sorted(path.name for path in output.iterdir())
        if as_json:
            print_json({"output": str(output), "digest": source.digest, "files": names})
            return
        console().print(f"wrote {output}: {', '.join(names)}", markup=False, soft_wrap=True)


def _copy(folder: Path, output: Path) -> None:
    """Copy the files of a folder; the new one appears whole or not at all."""
    growing = output.with_name(f".{output.name}.partial")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    try:
        for path in folder.iterdir():
            shutil.copyfile(path, growing / path.name)
        growing.rename(output)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
