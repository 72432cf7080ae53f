"""The options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.geometry import CACHE_BITS
from quant.runtimes import RUNTIMES

DEFAULT_SERVER = "http://127.0.0.1:8000"

ModelDir = Annotated[
    Path | None, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face folder with safetensors weights.")
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory",
        help="Instead of MODEL_DIR: package.module:function of your own that returns an nn.Module.",
    ),
]
Calibration = Annotated[
    Path, typer.Option("--calibration", "-c", help="Calibration data: .safetensors, .txt or .jsonl.")
]
PlanCalibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="The plan's calibration file, for quantizers that go by it."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take other weights than the plan was made for, of the same shapes.")
]
Schemes = Annotated[
    str | None, typer.Option("--schemes", help="The menu, comma separated; the runtime's own if left out.")
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", "-b", help='One budget per option: "3.5 bpw", "7 GiB", "bytes<=2 MiB,latency<=12 ms".'
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", help="A limit that holds for every budget (repeat for several)."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Sensitivity metric; repeat to store several, the first decides."),
]
Task = Annotated[
    str, typer.Option("--task", help="auto, causal_lm, image_classification, sequence_embedding or generic.")
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=8, help="At most this many samples in each of the three calibration parts."
    ),
]
SequenceLength = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens per sample of text.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the three parts, probes and searches.")]
Device = Annotated[str, typer.Option("--device", help="Where the workers measure: cpu or cuda.")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help='Fix the scheme of a layer or pattern: "lm_head=w8".')
]
Ties = Annotated[
    list[str] | None, typer.Option("--tie", help='Layers or patterns that get one scheme: "a,b".')
]
Excludes = Annotated[list[str] | None, typer.Option("--exclude", help="Leave matching layers alone (glob).")]
Includes = Annotated[
    list[str] | None, typer.Option("--include", help="Quantize matching embeddings or heads too (glob).")
]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", help=f"Only plans that it runs: {', '.join(RUNTIMES)}."),
]
Latency = Annotated[
    Path | None,
    typer.Option("--latency-table", help="JSON or CSV of layer x scheme nanoseconds, for latency limits."),
]
LatencySource = Annotated[
    str | None,
    typer.Option("--latency", help='"measured" (kernels timed here), "roofline:h100", or a table file.'),
]
EnergySource = Annotated[
    str | None, typer.Option("--energy", help='"device:h100" or a table file, in picojoules.')
]
DeviceProfile = Annotated[
    Path | None,
    typer.Option("--device-profile", help="JSON of a device of your own, for roofline:NAME and device:NAME."),
]
ContextLength = Annotated[
    int | None,
    typer.Option("--context-length", min=1, help="Tokens in each cache: for memory_bytes, active_bytes ..."),
]
ServingBatch = Annotated[int, typer.Option("--serving-batch", min=1, help="Sequences served at a time.")]
CacheType = Annotated[
    str, typer.Option("--kv-cache", help=f"Type of cached keys and values: {', '.join(CACHE_BITS)}.")
]
TimeLimit = Annotated[float, typer.Option("--time-limit", min=0.0, help="Seconds for one solve.")]
Gap = Annotated[float, typer.Option("--gap", min=0.0, help="Proven relative gap to stop at.")]
Evaluations = Annotated[
    int, typer.Option("--evaluations", min=0, help="Measured plans of the local search, per budget.")
]
ChooserName = Annotated[
    str,
    typer.Option("--chooser", help="How plans are tried beyond the candidates: local_search or black_box."),
]
RelativeError = Annotated[
    float, typer.Option("--relative-error", help="Relative standard error at which a Hessian trace is done.")
]
MaxProbes = Annotated[int, typer.Option("--max-probes", min=2, help="Most Hutchinson probes per layer.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per forward pass.")]
Corrections = Annotated[
    list[str] | None,
    typer.Option(
        "--correction",
        help="What plans change beside weights, on the calibration data: bias or batch_norm (repeatable).",
    ),
]
NoInteractions = Annotated[
    bool, typer.Option("--no-interactions", help="Do not add gram_output for quadratic candidates.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Plan file; a folder when there are several budgets.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only say what would be measured, in what time and memory."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on standard output.")]
Server = Annotated[str, typer.Option("--server", envvar="BITPLAN_SERVER", help="Address of the service.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where scores and files are kept (BITPLAN_DATA_DIR).")
]


def assignments(pairs: list[str] | None) -> dict[str, str]:
    """`["lm_head=w8"]` as a mapping.

    >>> assignments(["lm_head=w8"])
    {'lm_head': 'w8'}
    """
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, sign, scheme = pair.rpartition("=")
        if not (sign and name.strip() and scheme.strip()):
            raise ValueError(f'A pin must be written LAYER=SCHEME, as in "lm_head=w8". Got {pair!r}.')
        found[name.strip()] = scheme.strip()
    return found


def names(groups: list[str] | None) -> list[list[str]]:
    """`["a,b"]` as lists of names.

    >>> names(["a, b"])
    [['a', 'b']]
    """
    return [[name.strip() for name in group.split(",") if name.strip()] for group in groups or ()]
