"""Real kernels at a layer's shape, and how long they take on this machine's CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant.digest import digest
from quant.latency import KERNELS_VERSION, Case, Timing
from sensitivity.errors import BadUnit, SessionError
from sensitivity.spec import SessionSpec
from sensitivity.units import TimingUnit, Unit, UnitResult

Run = Callable[[Tensor], Tensor]

WARM_UP, FEWEST, MOST = 3, 15, 200
ENOUGH_SECONDS = 0.15
WIDTH, HEADS = 512, 8
"""Sides of the code around a layer."""


def dense(weight: Tensor) -> Run:
    """Matrix product with a weight (output channels, columns) of the input's own type."""
    return lambda inputs: functional.linear(inputs, weight)


def embedding(weight: Tensor) -> Run:
    """One row per token; the inputs are token numbers."""
    return lambda inputs: functional.embedding(inputs, weight)


def int8_weight_only(weight: Tensor) -> Run:
    """Symmetric 8-bit weights with one scale per output channel; activations at full precision."""
    exact = weight.float()
    scales = exact.abs().amax(dim=1).clamp_min(1e-8) / 127
    values = (exact / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    stored = scales.to(weight.dtype)
    return lambda inputs: torch._weight_int8pack_mm(inputs, values, stored)


def int8_dynamic(weight: Tensor) -> Run:
    """Symmetric 8-bit weights per output channel, activations quantized to 8 bits tensor by tensor."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    module.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig  # type: ignore[assignment]
    run: Run = torch.ao.nn.quantized.dynamic.Linear.from_float(module)  # type: ignore[no-untyped-call]
    return run


def int4_weight_only(weight: Tensor, group: int) -> Run:
    """4-bit weights with a scale and a zero point per group of columns; activations at full precision."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, columns // group, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = (high - low).clamp_min(1e-8) / 15
    values = ((grouped - low[:, :, None]) / scales[:, :, None]).round().clamp(0, 15)
    packed = torch._convert_weight_to_int4pack_for_cpu(values.reshape(rows, columns).to(torch.int32), 1)
    middle = low + 8 * scales
    parameters = torch.stack([scales, middle], dim=2).transpose(0, 1).contiguous().to(weight.dtype)
    return lambda inputs: torch._weight_int4pack_mm_for_cpu(inputs, packed, group, parameters)


KERNELS: dict[str, Callable[[Tensor, int], Run]] = {
    "dense": lambda weight, _: dense(weight),
    "embedding": lambda weight, _: embedding(weight),
    "int8_dynamic": lambda weight, _: int8_dynamic(weight),
    "int8_weight_only": lambda weight, _: int8_weight_only(weight),
    "int4_weight_only": int4_weight_only,
}


class KernelSession:
    """Times kernels; of `spec` only device and threads matter. Answers a `TimingUnit`.

    Raises SessionError for a device that it has no kernels for.
    """

    def __init__(self, spec: SessionSpec) -> None:
        if spec.device != "cpu":
            raise SessionError(
                f"device must be cpu to measure latency. Got {spec.device!r}. Use a roofline or a table."
            )
        torch.set_num_threads(spec.threads)
        self._identity = _identity(spec.threads)

    def run(self, unit: Unit) -> UnitResult:
        """Facts: the device's fingerprint and, by key, timings of the cases that are not known for it."""
        if not isinstance(unit, TimingUnit):
            raise BadUnit(f"a kernel session must be asked for timings. Got {unit.key!r}.")
        fingerprint = digest(self._identity)[:16]
        known = unit.known.get(fingerprint, ())
        timings = {
            case.key: time_case(case).as_json()
            for case in (Case(**dict(item)) for item in unit.cases)
            if case.key not in known
        }
        facts = {"fingerprint": fingerprint, "device": self._identity, "timings": timings, "forwards": 0}
        return UnitResult((), {}, facts)


class Around(torch.nn.Module):
    """What stands between two linear layers of a transformer: a norm, a rotation, attention, a gate."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = torch.nn.SiLU()
        self.scale = torch.ones(WIDTH, dtype=dtype)
        self.start = torch.linspace(-1, 1, WIDTH).to(dtype).reshape(1, WIDTH)

    def forward(self) -> Tensor:
        """One token."""
        wide = self.start.float()
        steady = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        hidden = steady.to(self.start.dtype) * self.scale
        first, second = hidden.chunk(2, -1)
        hidden = hidden + torch.cat((-second, first), -1) * self.scale
        heads = hidden.view(1, 1, HEADS, -1).transpose(1, 2)
        weights = torch.softmax((heads @ heads.transpose(2, 3)).float(), -1).to(hidden.dtype)
        mixed: Tensor = self.gate((weights @ heads).transpose(1, 2).reshape(1, WIDTH))
        return self.start + mixed


def time_case(case: Case) -> Timing:
    """What a kernel adds to the time of a model: its own, and what the code around it waits for because the
    weights pushed it out of the caches. Median and spread of repeats.

    The weights rotate through `case.copies` copies, so that they are as far from the processor as they are
    between two passes over the whole model.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    runs = []
    for _ in range(case.copies):
        weight = torch.randn(case.rows, case.columns, generator=generator).to(dtype)
        runs.append(KERNELS[case.kernel](weight, case.group))
    inputs, around = _inputs(case, dtype, generator), Around(dtype)
    with torch.inference_mode():
        for turn in range(max(WARM_UP, len(runs))):
            runs[turn % len(runs)](inputs)
            around()
        return _timed(runs, inputs, around)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if case.kernel == "embedding":
        return torch.randint(0, case.rows, (case.batch,), generator=generator)
    return torch.randn(case.batch, case.columns, generator=generator).to(dtype)


def _timed(runs: list[Run], inputs: Tensor, around: Around) -> Timing:
    """Each repeat times the code around a layer twice: after itself, and after a kernel.

    One thread is timed by its own processor time, which other processes on the machine do not add to. What
    timing takes by itself is taken off.
    """
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def nanoseconds(call: Callable[..., object], *arguments: Tensor) -> int:
        before = clock()
        call(*arguments)
        return clock() - before

    nothing = median(nanoseconds(lambda: None) for _ in range(FEWEST))
    own: list[float] = []
    added: list[int] = []
    start = time.perf_counter()
    while len(own) < FEWEST or (len(own) < MOST and time.perf_counter() - start < ENOUGH_SECONDS):
        alone = nanoseconds(around)
        own.append(max(1.0, nanoseconds(runs[len(own) % len(runs)], inputs) - nothing))
        added.append(nanoseconds(around) - alone)
    low, middle, high = quantiles(own, n=4)
    return Timing(middle + max(0, median(added)), (high - low) / 2, len(own))


def _identity(threads: int) -> Mapping[str, Any]:
    """What decides how fast a kernel is here."""
    return {
        "device": "cpu",
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "kernels_version": KERNELS_VERSION,
    }


def _processor() -> list[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return [os.uname().machine]
    wanted = ("model name", "cpu family", "model", "stepping", "cache size")
    lines = [line.partition(":") for line in path.read_text().split("\n\n", 1)[0].splitlines()]
    return [value.strip() for name, _, value in lines if name.strip() in wanted]
