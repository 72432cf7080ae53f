"""How fast formats are: GB/s of float32 weights through rtn, clip search, packing and unpacking.

    python benchmarks/formats.py --rows 4096 --columns 14336 --schemes w4,q4_k --threads 1 --device cpu

Each number is the float32 size of the matrix over the best of `--repeats` runs; torch's copy of the same
matrix stands first. `peak` is the memory that quantizing takes on top, over the matrix's float32 size: of
CUDA's allocator, or of the process (sampled each millisecond) on the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from quant.catalog import QUANTIZERS
from quant.formats import codec_of
from quant.schemes import parse_schemes

SCHEMES = (
    "w2,w3,w4,w4-g128-asym,w4-tensor,w8,fp8,fp8-e5m2,fp4,nf4,mxfp4,mxfp8,nvfp4,"
    "q4_0,q4_1,q5_0,q5_1,q8_0,q2_k,q3_k,q4_k,q5_k,q6_k,bf16,fp16"
)
HEADER = ("scheme", "bits", "rtn", "clip search", "pack", "unpack", "decode", "peak rtn", "peak search")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(options.rows, options.columns, generator=generator).to(options.device)
    copy, _ = timed(matrix.clone, 3)
    print(f"{options.rows} x {options.columns} float32, {options.threads} thread(s), {options.device}")
    print(f"torch copy {matrix.nbytes / copy / 1e9:.2f} GB/s\n")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for scheme in parse_schemes(options.schemes):
        row = measure(matrix, scheme.weight, options.repeats)
        bits = scheme.storage(tuple(matrix.shape)).bits / matrix.numel()
        print(f"| {scheme.weight.short} | {bits:.3f} | " + " | ".join(row) + " |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def measure(matrix: torch.Tensor, fmt: Any, repeats: int) -> list[str]:
    """GB/s and peaks of one format, as they are printed."""
    codec, seconds, peaks = codec_of(fmt), [], []
    for name in ("rtn", "mse_clip"):
        quantize = QUANTIZERS[name].load()
        quantize(matrix[:1].contiguous(), fmt)
        with peak_memory(matrix) as peak:
            spent, coded = timed(lambda: quantize(matrix, fmt), repeats)  # noqa: B023
        seconds.append(spent)
        peaks.append(peak[0] / matrix.nbytes)
    spent, packed = timed(lambda: codec.pack(coded), repeats)
    seconds.append(spent)
    del coded
    spent, coded = timed(lambda: codec.unpack(packed), repeats)
    seconds.append(spent)
    seconds.append(timed(lambda: codec.decode(coded), repeats)[0])
    rates = [f"{matrix.nbytes / spent / 1e9:.3f}" for spent in seconds]
    return [*rates, *(f"{peak:.2f} x" for peak in peaks)]


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The best time in seconds, and what the last run returned."""
    best, result = float("inf"), None
    for _ in range(repeats):
        result = None
        _synchronize()
        start = time.perf_counter()
        result = work()
        _synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory(matrix: torch.Tensor) -> Any:
    """A list whose first item is, afterwards, the most memory taken on top of what there was."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    found = [0]
    if matrix.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - before
        return
    before, running = _resident(), True

    def watch() -> None:
        while running:
            found[0] = max(found[0], _resident() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        running = False
        thread.join()


def _resident() -> int:
    """Resident bytes of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
