"""The runtimes that plans are made for. A new one is one entry of RUNTIMES."""

from __future__ import annotations

from typing import get_args

from quant.geometry import CACHE_BITS
from quant.layers import EXPERT_OPS, Op
from quant.runtime_rules import Fused, Integers, Named, Rule, Runtime

ALL_OPS = get_args(Op)
OWN_OPS = tuple(op for op in ALL_OPS if op not in EXPERT_OPS)
"""Modules with a weight of their own."""
LINEARS = ("linear", "transformers_conv1d")
LLAMA_FUSED = (Fused(("q_proj", "k_proj", "v_proj")), Fused(("gate_proj", "up_proj")))
BLOCK_EXPERTS = (
    Fused(("experts.*.gate_proj", "experts.*.up_proj", "experts.*.down_proj")),
    Fused(("experts.*.w1", "experts.*.w2", "experts.*.w3")),
    Fused(("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")),
)
"""One scheme for all experts of a block."""
STACKED_EXPERTS = tuple(
    Fused((f"experts.*.{name}",)) for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
)
"""One tensor per projection, which the fused experts of transformers are already."""
GGUF_OPS = ("linear", "embedding", "transformers_conv1d", *EXPERT_OPS)
BOTH = (True, False)
FP8 = ("fp8", "fp8-float16", "fp8-bfloat16", "fp8-tensor*")
"""e4m3 with one scale per output channel or tensor."""

OWN_16_BITS = Rule(Named(("bf16*", "fp16*")), ops=ALL_OPS, own_type=True)
"""Layers may keep their precision."""

CHANNEL_MENU = (
    "w2-asym-adaround",
    "w3-asym-gptq",
    "w4-asym-gptq",
    "w5-asym-gptq",
    "w6-gptq",
    "w8-gptq",
)
"""What measures best at equal bytes of what was tried: docs/decisions/default-menu.md."""

VLLM = Runtime(
    name="vllm",
    summary="vLLM on NVIDIA GPUs: compressed-tensors (Marlin kernels), FP8, NVFP4",
    source="https://docs.vllm.ai/en/latest/features/quantization/",
    rules=(
        Rule(
            Integers((4, 8), groups=(32, 64, 128)),
            ops=("linear", "experts"),
            rows=64,
            columns=128,
            whole_groups=True,
            own_scales=True,
        ),
        Rule(
            Integers((4,), groups=(32, 64, 128), symmetric=(False,)),
            rows=64,
            columns=128,
            whole_groups=True,
            own_scales=True,
        ),
        Rule(
            Integers((8,)),
            rows=16,
            columns=16,
            activations=("int8*",),
        ),
        Rule(Named(FP8), rows=16, columns=16, activations=("fp8*",)),
        Rule(Named(("nvfp4*",)), rows=32, columns=32, activations=("nvfp4s",)),
        OWN_16_BITS,
    ),
    fused=(*LLAMA_FUSED, Fused(("query", "key", "value")), *BLOCK_EXPERTS),
    kv_cache=("float16", "bfloat16", "fp8_e4m3"),
    menu=(
        "w4-bfloat16-gptq",
        "w4-g128-bfloat16-gptq",
        "w4-g128-asym-bfloat16-gptq",
        "w4-g32-asym-bfloat16-gptq",
        "w8-bfloat16-gptq",
    ),
)
LLAMA_CPP = Runtime(
    name="llama.cpp",
    summary="llama.cpp and everything that reads GGUF",
    source="https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
    rules=(
        Rule(
            Named(("q4_0*", "q4_1*", "q5_0*", "q5_1*", "q8_0*")),
            ops=GGUF_OPS,
            columns=32,
        ),
        Rule(
            Named(("q2_k*", "q3_k*", "q4_k*", "q5_k*", "q6_k*")),
            ops=GGUF_OPS,
            columns=256,
        ),
        Rule(Named(("bf16*", "fp16*")), ops=ALL_OPS),
    ),
    fused=STACKED_EXPERTS,
    embeddings=True,
    heads=True,
    kv_cache=("float16", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    menu=("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q5_0", "bf16"),
    without=("pooler.dense", "*.pooler.dense"),
)
TORCHAO = Runtime(
    name="torchao",
    summary="torchao configurations through transformers (FqnToConfig), CPU and GPU",
    source="https://docs.pytorch.org/ao/stable/",
    rules=(
        Rule(
            Integers(
                (2, 3, 4, 5, 6, 7, 8),
                groups=(),
                symmetric=BOTH,
                scale_types=("float16", "bfloat16", "float32"),
            ),
            ops=("linear", "embedding"),
            whole_groups=True,
        ),
        Rule(Integers((8,)), activations=("int8",)),
        Rule(Named(FP8)),
        OWN_16_BITS,
    ),
    embeddings=True,
    heads=True,
    menu=CHANNEL_MENU,
)
MLX = Runtime(
    name="mlx",
    summary="MLX and mlx-lm on Apple silicon and CPUs: affine groups, MXFP4, MXFP8",
    source="https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html",
    rules=(
        Rule(
            Integers((2, 3, 4, 5, 6, 8), channel=False, groups=(32, 64, 128), symmetric=(False,)),
            ops=("linear", "embedding"),
            whole_groups=True,
        ),
        Rule(Named(("mxfp4*", "mxfp8*")), ops=("linear", "embedding"), columns=32),
        OWN_16_BITS,
    ),
    fused=STACKED_EXPERTS,
    embeddings=True,
    heads=True,
    kv_cache=("float16", "bfloat16", "int8", "int4"),
    menu=(
        "w2-g64-asym-gptq",
        "w3-g64-asym-gptq",
        "w4-g64-asym-gptq",
        "w5-g64-asym-gptq",
        "w6-g64-asym-gptq",
        "w8-g64-asym-gptq",
    ),
)
ONNXRUNTIME = Runtime(
    name="onnxruntime",
    summary="ONNX Runtime with MatMulNBits nodes",
    source="https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md",
    rules=(
        Rule(
            Integers(
                (2, 4, 8),
                channel=False,
                groups=(16, 32, 64, 128, 256),
                symmetric=BOTH,
                scale_types=("float16", "bfloat16", "float32"),
            ),
            ops=LINEARS,
        ),
        OWN_16_BITS,
    ),
    heads=True,
    menu=("w4-g128-asym-gptq", "w4-g32-asym-gptq", "w4-g16-asym-gptq", "w8-g128-gptq"),
)
OPENVINO = Runtime(
    name="openvino",
    summary="OpenVINO with NNCF weight compression",
    source="https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/weight-compression.html",
    rules=(
        Rule(Integers((8,), symmetric=BOTH), ops=OWN_OPS),
        Rule(Integers((4,), groups=(), symmetric=BOTH), ops=LINEARS, whole_groups=True),
        Rule(Named(("nf4*",)), ops=LINEARS),
        Rule(Named(("mxfp4*",)), ops=LINEARS, columns=32),
        Rule(Named(("bf16*", "fp16*")), ops=ALL_OPS),
    ),
    embeddings=True,
    heads=True,
    kv_cache=("float16", "bfloat16", "int8"),
    menu=("w4-g128-asym-gptq", "w4-g64-asym-gptq", "w4-g32-asym-gptq", "w8-gptq"),
)
GENERIC = Runtime(
    name="generic",
    summary="No rule: every format on every layer",
    source="Bitplan",
    rules=(Rule(Named(("*",)), ops=ALL_OPS, activations=("*",), additions=("*",)),),
    embeddings=True,
    heads=True,
    kv_cache=tuple(CACHE_BITS),
    one_cache=False,
    menu=CHANNEL_MENU,
)

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (VLLM, LLAMA_CPP, TORCHAO, MLX, ONNXRUNTIME, OPENVINO, GENERIC)
}


def default_menu(runtime: str | None = None) -> tuple[str, ...]:
    """The schemes that are tried where a request names none, for a key of RUNTIMES.

    >>> default_menu("mlx")[0], default_menu() == default_menu("generic")
    ('w2-g64-asym-gptq', True)
    """
    return RUNTIMES[runtime or GENERIC.name].menu
