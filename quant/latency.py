"""Latency and energy of each (layer, scheme): which kernel runs it, what it moves, and what that costs.

Three sources behind one table {layer: {scheme: nanoseconds}}: the user's own (quant/costs.py), kernels
timed on a device (`measured_latency`), and a device profile (`roofline_latency`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal, cast

from quant.costs import CostError, Latency
from quant.devices import Device
from quant.geometry import Geometry
from quant.integer import IntegerFormat
from quant.layers import DTYPE_BITS, Layer
from quant.schemes import Scheme

Kernel = Literal["dense", "embedding", "int8_dynamic", "int8_weight_only", "int4_weight_only"]
KERNELS_VERSION = 2
"""Raised when a kernel is timed in another way, so that old timings are not used."""
GROUPS = (256, 128, 64, 32)
"""Group sizes of the 4-bit kernel, the largest first."""
LARGEST_ROTATION = 2**28
LINEARS = ("linear", "transformers_conv1d")


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: what is timed once and used for every layer that it fits.

    A linear layer is (output channels, columns) with `batch` rows of input. Convolutions are timed as the
    matrix product they are: `batch` then counts output positions. `group` is the group size of the 4-bit
    kernel, 0 for the others. `copies` of the weight are used in turn: about as many as fill the model.
    """

    kernel: Kernel
    rows: int
    columns: int
    batch: int
    dtype: str
    group: int = 0
    copies: int = 1

    def as_json(self) -> dict[str, Any]:
        """Plain values: `Case(**case.as_json()) == case`."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Stable name, for caches.

        >>> Case("int4_weight_only", 64, 128, 1, "float32", 32).key
        'int4_weight_only:64x128:1:float32:g32:x1'
        """
        shape = f"{self.rows}x{self.columns}:{self.batch}:{self.dtype}"
        return f"{self.kernel}:{shape}:g{self.group}:x{self.copies}"


@dataclass(frozen=True)
class Timing:
    """Median of repeats and their spread (half the distance between the quartiles), in nanoseconds."""

    median_ns: float
    spread_ns: float
    repeats: int

    def as_json(self) -> dict[str, Any]:
        """Plain values: `Timing(**timing.as_json()) == timing`."""
        return asdict(self)


def case_of(
    layer: Layer, scheme: Scheme | None, batch: int, parameters: int = 0, geometry: Geometry | None = None
) -> Case:
    """The kernel that runs a layer in a scheme (None: at full precision) for `batch` samples or tokens.

    `parameters` are those of the whole model: how much else passes through the caches between two calls.
    Of fused experts it is the kernel of one expert with its share of the tokens (`calls` of them run).

    Weights of up to 4 bits run in the 4-bit weight-only kernel where its group sizes divide the columns and
    the format's groups, weights of 5 to 8 bits per channel in the 8-bit one, int8 activations in the
    dynamic 8-bit one (static ones too, for which it looks for a range in vain); all others run dequantized.
    Raises CostError for a convolution without a MAC count.
    """
    if layer.experts > 1:
        tokens = batch * _active(layer, geometry) / calls(layer, batch, geometry)
        return case_of(_one_expert(layer), scheme, max(1, round(tokens)), parameters)
    rows, columns = layer.matrix
    kernel, group = _kernel(layer, scheme)
    return Case(
        kernel, rows, columns, _positions(layer, batch), layer.dtype, group, _copies(layer, parameters)
    )


def calls(layer: Layer, batch: int, geometry: Geometry | None) -> Fraction:
    """How often a layer's kernel runs in one pass of `batch` tokens: once, or for each expert that is used.

    Raises CostError for experts without a geometry that says how many of them each token uses.
    """
    if layer.experts == 1:
        return Fraction(1)
    _active(layer, geometry)
    return layer.experts * cast(Geometry, geometry).expert_share(batch)


def _active(layer: Layer, geometry: Geometry | None) -> int:
    if geometry is None or not geometry.active or geometry.experts != layer.experts:
        raise CostError(
            f"Latency and energy of experts must be of a model whose configuration says how many a token uses"
            f" (num_experts_per_tok). Got none for the {layer.experts} of {layer.name}. Send a table."
        )
    return min(geometry.active, geometry.experts)


def _one_expert(layer: Layer) -> Layer:
    """An expert as a linear layer of its own."""
    rows, columns = layer.matrix
    matrix = (rows // layer.experts, columns)
    return replace(
        layer, op="linear", weight_shape=matrix, matrix=matrix, parameters=layer.parameters // layer.experts
    )


def _copies(layer: Layer, parameters: int) -> int:
    """A power of two, so that layers of similar models share timings; at most `LARGEST_ROTATION` bytes."""
    fitting = max(1, LARGEST_ROTATION // layer.stored_bytes)
    wanted = min(fitting, max(1, parameters // layer.parameters))
    return 1 << (wanted * wanted).bit_length() // 2


def _kernel(layer: Layer, scheme: Scheme | None) -> tuple[Kernel, int]:
    weight = None if scheme is None else scheme.weight
    if layer.op == "embedding":
        return "embedding", 0
    if scheme is None or not isinstance(weight, IntegerFormat) or layer.op not in LINEARS:
        return "dense", 0
    if scheme.activation is not None:
        whole = weight.symmetric and weight.granularity != "group" and layer.dtype == "float32"
        dynamic = whole and scheme.activation.kind == "int8"
        return ("int8_dynamic", 0) if dynamic else ("dense", 0)
    if weight.bits <= 4:
        group = _group(layer, weight)
        return ("int4_weight_only", group) if group else ("dense", 0)
    whole = weight.symmetric and weight.granularity != "group"
    return ("int8_weight_only", 0) if whole else ("dense", 0)


def _group(layer: Layer, weight: IntegerFormat) -> int:
    """The largest group of the 4-bit kernel that the format's scales can be repeated for; 0 if none fits."""
    rows, columns = layer.matrix
    limit = columns if weight.group_size is None else weight.group_size
    fitting = [size for size in GROUPS if columns % size == 0 and limit % size == 0]
    return fitting[0] if fitting and rows % 16 == 0 else 0


def _positions(layer: Layer, batch: int) -> int:
    if layer.op in (*LINEARS, "embedding"):
        return batch
    if layer.macs is None:
        raise CostError(
            f"A convolution must have a MAC count for its latency. Got none for {layer.name}."
            " Send calibration data that reaches it, or exclude it."
        )
    return max(1, batch * layer.macs // layer.parameters)


def cases(
    layers: Sequence[Layer], schemes: Sequence[Scheme], batch: int, geometry: Geometry | None = None
) -> tuple[Case, ...]:
    """Every kernel that has to be timed, each once."""
    parameters = sum(layer.parameters for layer in layers)
    found = (
        case_of(layer, scheme, batch, parameters, geometry)
        for layer in layers
        for scheme in _offered(layer, schemes)
    )
    return tuple(dict.fromkeys(found))


def _offered(layer: Layer, schemes: Iterable[Scheme]) -> list[Scheme]:
    return [scheme for scheme in schemes if scheme.refuses(layer) is None]


def measured_latency(
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    batch: int,
    timings: Mapping[str, Timing],
    geometry: Geometry | None = None,
) -> Latency:
    """The table from timings by `Case.key`. Raises CostError naming the first case without one."""
    parameters = sum(layer.parameters for layer in layers)

    def nanoseconds(layer: Layer, scheme: Scheme) -> Fraction:
        case = case_of(layer, scheme, batch, parameters, geometry)
        if case.key not in timings:
            raise CostError(f"Every kernel must be timed. Got no timing of {case.key}. Measure it.")
        return rounded(Fraction(timings[case.key].median_ns) * calls(layer, batch, geometry))

    return _table(layers, schemes, nanoseconds)


def roofline_latency(
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    batch: int,
    device: Device,
    geometry: Geometry | None = None,
) -> Latency:
    """The table from a device profile; `device.relative_error` is its error bar."""

    def nanoseconds(layer: Layer, scheme: Scheme) -> Fraction:
        kind, operations, traffic = work(layer, scheme, batch, geometry)
        return rounded(device.nanoseconds(kind, operations, traffic))

    return _table(layers, schemes, nanoseconds)


def device_energy(
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    batch: int,
    device: Device,
    geometry: Geometry | None = None,
) -> Latency:
    """Picojoules from a device profile, in the shape of a latency table."""

    def picojoules(layer: Layer, scheme: Scheme) -> Fraction:
        kind, operations, traffic = work(layer, scheme, batch, geometry)
        return Fraction(round(device.picojoules(kind, operations, traffic)))

    return _table(layers, schemes, picojoules)


def rounded(nanoseconds: float | Fraction) -> Fraction:
    """To the picosecond, so that sums stay short decimals.

    >>> rounded(1 / 3)
    Fraction(333, 1000)
    """
    return Fraction(round(Fraction(nanoseconds) * 1000), 1000)


def work(
    layer: Layer, scheme: Scheme, batch: int, geometry: Geometry | None = None
) -> tuple[str, int, Fraction]:
    """Type of arithmetic, operations, and bytes moved: packed weights, inputs and outputs.

    An embedding reads one row per token and computes nothing. Of fused experts, the weights of those that
    `batch` tokens are expected to use, and every token as often as it uses one.
    """
    if layer.experts > 1:
        used, rows = calls(layer, batch, geometry), batch * _active(layer, geometry)
        kind, operations, moved = work(_one_expert(layer), scheme, rows)
        one = scheme.storage(_one_expert(layer).matrix).bytes
        share = Fraction(used, layer.experts)
        return kind, operations, moved - one + share * scheme.storage(layer.matrix).bytes
    rows, columns = layer.matrix
    stored, positions = scheme.storage(layer.matrix).bytes, _positions(layer, batch)
    width = DTYPE_BITS[layer.dtype] // 8
    kind = "float32" if DTYPE_BITS[layer.dtype] >= 32 else "bfloat16"
    if layer.op == "embedding":
        return kind, 0, Fraction(stored * min(positions, rows), rows) + positions * columns * width
    inputs = layer.weight_shape[1] if layer.op.startswith("conv") else columns
    if scheme.activation is not None and scheme.weight_bits <= 8:
        kind = "int8" if scheme.activation.element is None else "float8"
    return kind, 2 * layer.parameters * positions, Fraction(stored + positions * (inputs + rows) * width)


def _table(
    layers: Sequence[Layer], schemes: Sequence[Scheme], cost: Callable[[Layer, Scheme], Fraction]
) -> Latency:
    return {
        layer.name: {scheme.name: cost(layer, scheme) for scheme in _offered(layer, schemes)}
        for layer in layers
    }
