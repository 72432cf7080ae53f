"""vLLM: `config.json` with a compressed-tensors `quantization_config`.

Rules: weight-only integers of 2 to 8 bits, zero points for 4 and 8 bits only, scales per output channel or
for groups of 32, 64 or 128 columns, and one scheme for matrices that vLLM loads as one.
"""

from __future__ import annotations

import json

from quant.export.compressed_config import packed_bytes, quantization_config, read_config
from quant.export.protocol import Deployment, Files, ModelFacts, Violation, WeightFacts
from quant.export.rules import CHANNEL, Takes, fused_agree, only_formats, only_ops

FILE = "config.json"
TAKES = (Takes("int", symmetric=range(2, 9), asymmetric=(4, 8), scales=(CHANNEL, 32, 64, 128)),)


def lint(deployment: Deployment) -> tuple[Violation, ...]:
    """Every violation of vLLM's rules."""
    return (
        *only_ops(deployment, ("linear",)),
        *only_formats(deployment, *TAKES),
        *fused_agree(deployment),
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
