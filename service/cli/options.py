"""The options that several commands share, spelled once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from quant.geometry import CACHE_BITS
from quant.runtimes import RUNTIMES
from search.choosers import CHOOSERS
from sensitivity.scorers.metric_decoupled import ROLES

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
Hub = Annotated[
    str | None,
    typer.Option(
        "--hub",
        metavar="OWNER/NAME@COMMIT",
        help="Instead of MODEL_DIR: a hub's repository at one commit, all 40 digits, and :FOLDER for a part.",
    ),
]
UserMetric = Annotated[
    str | None,
    typer.Option(
        "--user-metric",
        help="package.module:function of your own, (outputs, batch, reference) -> one number per sample, "
        "smaller is better: measured of every plan; with --metric user_metric it decides.",
    ),
]
Calibration = Annotated[
    Path,
    typer.Option(
        "--calibration", "-c", help="Calibration data: .safetensors, .npz, .txt, .jsonl or .parquet."
    ),
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
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help='A quality to keep in the fewest bytes, one plan each: "kl<=0.01", "perplexity within 2 %",'
        ' "accuracy within 0.5 points".',
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", help="A limit that holds for every budget (repeat for several)."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Sensitivity metric, or auto; repeat to store several, the first decides."),
]
RefineMetric = Annotated[
    str | None,
    typer.Option(
        "--refine-metric",
        help="Decides instead of the first metric; measured only for choices near a decision.",
    ),
]
TimeBudget = Annotated[
    str | None,
    typer.Option("--time-budget", help='What the search may take, for --metric auto: "10min", "2h", "90s".'),
]
RoleMetrics = Annotated[
    list[str] | None,
    typer.Option(
        "--role-metric",
        help='For --metric metric_decoupled: what decides a role, layer or pattern: "cross_attention=ssim".',
    ),
]
Roles = Annotated[
    list[str] | None,
    typer.Option("--role", help=f'Role of a layer or pattern, "*.proj_out=head": {", ".join(ROLES)}.'),
]
RoleLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--role-limit", help='A limit on a role, layer or pattern alone: "convolution=5 bpw" (repeat).'
    ),
]
Ratios = Annotated[
    list[float] | None,
    typer.Option(
        "--ratio",
        help="For metric_decoupled: bits of one metric's layers over those of the rest (repeat for a sweep).",
    ),
]
ContextPlans = Annotated[
    str | None,
    typer.Option(
        "--contexts",
        help="Split scores by context; one plan by their weighted mean or maximum, or a plan for each:"
        " weighted, maximum or each.",
    ),
]
TimestepEdges = Annotated[
    list[float] | None,
    typer.Option("--timestep-edge", help="Contexts are ranges of timesteps cut here (repeat, rising)."),
]
ContextWeights = Annotated[
    list[str] | None,
    typer.Option("--context-weight", help='Weight of a context, "code=2" (repeat).'),
]
Protect = Annotated[
    list[str] | None,
    typer.Option("--protect", help="Matching layers get the largest scheme of the menu (glob)."),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option("--forbid", help="LAYER=SCHEME[,SCHEME] that a layer, or those of a pattern, must not get."),
]
Task = Annotated[
    str,
    typer.Option(
        "--task", help="auto, causal_lm, image_classification, sequence_embedding, diffusion or generic."
    ),
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
    list[str] | None,
    typer.Option(
        "--pin", help='Fix the scheme of a layer or pattern: "lm_head=w8", "*.0.self_attn=kv-full".'
    ),
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
    str,
    typer.Option(
        "--kv-cache-type",
        help=f"Type of caches that are not decided, as memory counts them: {', '.join(CACHE_BITS)}.",
    ),
]
CacheTypes = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help="Decide each attention layer's cache too: types to choose from beside the full one, for example"
        " fp8,int8,int4.",
    ),
]
TimeLimit = Annotated[float, typer.Option("--time-limit", min=0.0, help="Seconds for one solve.")]
Gap = Annotated[float, typer.Option("--gap", min=0.0, help="Proven relative gap to stop at.")]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help='What plans are solved for: sum, minimax, "lexicographic: output_kl within 1%, sqnr" ...; see'
        " `bitplan allocate --help`.",
    ),
]
Evaluations = Annotated[
    int, typer.Option("--evaluations", min=0, help="Measured plans of the local search, per budget.")
]
ChooserName = Annotated[
    str,
    typer.Option(
        "--chooser",
        help=f"How plans are tried beyond the candidates: {', '.join(CHOOSERS)}; nsga2 and motpe show the"
        " Pareto set of what they measured.",
    ),
]
RelativeError = Annotated[
    float, typer.Option("--relative-error", help="Relative standard error at which a Hessian trace is done.")
]
MaxProbes = Annotated[int, typer.Option("--max-probes", min=2, help="Most Hutchinson probes per layer.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per forward pass.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        help='Most anonymous memory of a worker, as "2 GiB": what does not fit is streamed block by block.',
    ),
]
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
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="File with the key for the service (or BITPLAN_KEY, BITPLAN_KEY_FILE)."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where scores and files are kept (BITPLAN_DATA_DIR).")
]


def assignments(
    pairs: list[str] | None, what: str = "A pin", form: str = "LAYER=SCHEME", example: str = "lm_head=w8"
) -> dict[str, str]:
    """`["lm_head=w8"]` as a mapping.

    >>> assignments(["lm_head=w8"])
    {'lm_head': 'w8'}
    """
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, sign, scheme = pair.rpartition("=")
        if not (sign and name.strip() and scheme.strip()):
            raise ValueError(f'{what} must be written {form}, as in "{example}". Got {pair!r}.')
        found[name.strip()] = scheme.strip()
    return found


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def seconds(text: str | None) -> float | None:
    """A time as people write it. Raises ValueError.

    >>> seconds("10min"), seconds("1.5 h"), seconds(None)
    (600.0, 5400.0, None)
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f'A time must be a number with s, min or h, as in "10min". Got {text!r}.')
    return float(found[1]) * _SECONDS[found[2]]


def names(groups: list[str] | None) -> list[list[str]]:
    """`["a,b"]` as lists of names.

    >>> names(["a, b"])
    [['a', 'b']]
    """
    return [[name.strip() for name in group.split(",") if name.strip()] for group in groups or ()]


def forbidden(texts: list[str] | None) -> dict[str, list[str]]:
    """Schemes by the layer or pattern that must not get them.

    >>> forbidden(["*.up=w2, w3", "head=w2", "head=w3"])
    {'*.up': ['w2', 'w3'], 'head': ['w2', 'w3']}
    """
    found: dict[str, list[str]] = {}
    for text in texts or ():
        given = assignments([text], "What is forbidden", "LAYER=SCHEME[,SCHEME]", "lm_head=w2,w3")
        for name, schemes in given.items():
            found.setdefault(name, []).extend(names([schemes])[0])
    return found


def role_limits(texts: list[str] | None) -> dict[str, str] | None:
    """Limits by what they are about, the first "=" between them; None where there are none.

    >>> role_limits(["convolution=bytes<=2 KiB", "*.ff.*=4 bpw"])
    {'convolution': 'bytes<=2 KiB', '*.ff.*': '4 bpw'}
    """
    found: dict[str, str] = {}
    for text in texts or ():
        key, sign, limit = text.partition("=")
        if not (sign and key.strip() and limit.strip()):
            raise ValueError(
                f'A limit of a role must be written ROLE=LIMIT, as in "convolution=5 bpw". Got {text!r}.'
            )
        found[key.strip()] = limit.strip()
    return found or None
