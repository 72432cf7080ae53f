"""vLLM: `config.json` with a compressed-tensors `quantization_config`.

Rules: integers of 2 to 8 bits with scales per output channel or for groups of 32, 64 or 128 columns, zero
points for 4 and 8 bits without quantized activations only, fp8 (e4m3), nvfp4, mxfp4 and mxfp8 with the
activations that vLLM has a kernel for, and one scheme for matrices that vLLM loads as one. Fused experts are
named one by one: symmetric integers of 4 or 8 bits, one scheme for a block.
"""

from __future__ import annotations

import json

from quant.export.compressed_config import packed_bytes, quantization_config, read_config
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import (
    CHANNEL,
    TENSOR,
    Takes,
    fused_agree,
    fused_have_channels,
    named_experts,
    only_formats,
    only_ops,
)

FILE = "config.json"
GRAINS = (CHANNEL, 32, 64, 128)
TAKES = (
    Takes("int", symmetric=range(2, 9), asymmetric=(4, 8), scales=GRAINS),
    Takes("int", symmetric=(8,), scales=(CHANNEL, TENSOR), activations=("int8", "int8s")),
    Takes("int", symmetric=range(2, 9), scales=GRAINS, activations=("int8",)),
    Takes("int", symmetric=range(2, 5), scales=GRAINS, activations=("int4",)),
    Takes("fp8_e4m3", scales=(CHANNEL, TENSOR), activations=(None, "fp8", "fp8s")),
    Takes("nvfp4", activations=(None, "nvfp4s")),
    Takes("mxfp4"),
    Takes("mxfp8", activations=("mxfp8",)),
)
"""What vLLM finds a scheme class for. Its kernel for mxfp8 always rounds activations too, the one for mxfp4
does on GPUs that multiply MXFP4."""
EXPERTS = (Takes("int", symmetric=(4, 8), scales=GRAINS),)
"""What its weight-only kernel for experts takes."""


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of vLLM's rules."""
    return (
        *only_ops(deployment, ("linear", "experts")),
        *only_formats(deployment, *TAKES),
        *named_experts(deployment, *EXPERTS),
        *fused_agree(deployment),
        *fused_have_channels(deployment),
    )


def files(deployment: Deployment) -> dict[str, bytes]:
    """The model's own configuration with the plan in it."""
    config = {**deployment.model.config, "quantization_config": quantization_config(deployment)}
    return {FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def stored_bytes(deployment: Deployment) -> int:
    """Bytes of the packed tensors of the planned weights."""
    return packed_bytes(deployment)


def read_back(exported: Files, model: ModelFacts) -> dict[str, WeightFacts | None]:
    """Module by module through the compressed-tensors library."""
    return read_config(json.loads(exported[FILE])["quantization_config"], model)
