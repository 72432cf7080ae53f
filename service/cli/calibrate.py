"""`bitplan calibrate`: calibration data made from a model alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sensitivity.catalog import DATA_FREE
from service.cli import options
from service.cli.exits import exits
from service.cli.output import JobProgress, console, print_json
from service.cli.plan_files import check_output
from service.cli.run import own_model

if TYPE_CHECKING:
    from sensitivity.spec import ModelSource
    from service.settings import Settings
    from service.wire import MakeCalibrationRequest

Method = Annotated[str, typer.Option("--method", help=f"How they are made: {', '.join(DATA_FREE)}.")]
Samples = Annotated[int, typer.Option("--samples", min=6, help="Samples in all, for all three parts.")]
Shape = Annotated[
    str | None,
    typer.Option("--shape", help="Channels, height and width of images, as 3,224,224; the model's own else."),
]


def calibrate(
    method: Method,
    output: Annotated[Path, typer.Option("--output", "-o", help="New file, .safetensors.")],
    model: options.ModelDir = None,
    factory: options.Factory = None,
    hub: options.Hub = None,
    samples: Samples = 192,
    sequence_length: options.SequenceLength = 512,
    shape: Shape = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Make calibration data from a model alone, where there are none: tokens it writes, images it knows."""
    with exits(as_json=as_json, interrupted="nothing was written"):
        from service.local import local_settings
        from service.made_calibration import require_size
        from service.wire import MakeCalibrationRequest

        if output.suffix != ".safetensors":
            raise ValueError(f"--output must end in .safetensors. Got {output.name!r}. Rename it.")
        check_output(output, several=False)
        request = MakeCalibrationRequest.model_validate(
            {
                "method": method,
                "samples": samples,
                "sequence_length": sequence_length,
                "shape": _shape(shape),
                "seed": seed,
            }
        )
        settings = local_settings()
        require_size(request, settings.max_upload_bytes)
        source = own_model(model, factory, hub, settings, as_json=as_json)
        _make(settings, source, request, device, output, as_json=as_json)
        facts: dict[str, Any] = {"output": str(output), **request.model_dump(mode="json")}
        if as_json:
            print_json(facts)
        else:
            console().print(f"wrote {samples} samples to {output}", markup=False)


def _make(
    settings: Settings,
    model: ModelSource,
    request: MakeCalibrationRequest,
    device: str,
    output: Path,
    *,
    as_json: bool,
) -> None:
    from sensitivity.spec import NO_DATA, SessionSpec
    from service.made_calibration import SESSION, units_of, write_samples
    from service.one_off import run_units

    units = units_of(request)
    with JobProgress(quiet=as_json) as bar:

        def show(done: int) -> None:
            bar({"stage": "generating", "progress": {"done": done, "total": len(units)}})

        spec = SessionSpec(model=model, calibration=NO_DATA, device=device)
        results = run_units(settings, spec, units, SESSION, show)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".bitplan-", dir=output.parent) as folder:
        file = Path(folder) / output.name
        write_samples((result.arrays for result in results), request.samples, file, settings.max_upload_bytes)
        file.replace(output)


def _shape(text: str | None) -> list[int]:
    """`"3,224,224"` as numbers.

    >>> _shape("1,8,8"), _shape(None)
    ([1, 8, 8], [])
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--shape must be three whole numbers, as 3,224,224. Got {text!r}.") from None
