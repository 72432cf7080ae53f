"""Recognizing models that are quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LIBRARIES = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fbgemm_gpu",
    "gptqmodel",
    "hqq",
    "modelopt",
    "optimum.quanto",
    "quark",
    "spqr_quant",
    "torch.ao.nn.quantized",
    "torch.ao.nn.qat",
    "torchao",
    "transformers.integrations.bitnet",
    "transformers.integrations.finegrained_fp8",
    "transformers.integrations.fp_quant",
    "transformers.integrations.mxfp4",
    "vptq",
)
STORED_NAMES = ("qweight", "weight_packed", "weight_quantized")


def quantized_reason(model: nn.Module) -> str | None:
    """Why a model counts as quantized already, or None."""
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        return "its config holds a quantization_config"
    for name, module in model.named_modules():
        library = _library(type(module).__module__)
        if library:
            return f"module {name!r} is a {type(module).__name__} of {library}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        reason = _tensor_reason(name, tensor)
        if reason:
            return reason
    return None


def _library(module: str) -> str | None:
    return next((name for name in LIBRARIES if module == name or module.startswith(name + ".")), None)


def _tensor_reason(name: str, tensor: Tensor) -> str | None:
    library = _library(type(tensor).__module__) or _library(type(tensor.data).__module__)
    if library:
        return f"tensor {name!r} is a {type(tensor.data).__name__} of {library}"
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or kind.startswith(("float8", "float4")):
        return f"tensor {name!r} is stored as {kind}"
    last = name.rsplit(".", 1)[-1]
    stored = isinstance(tensor, nn.Parameter) or last in STORED_NAMES or last == "weight"
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return f"tensor {name!r} is stored as {kind}" if stored and integer and tensor.ndim >= 2 else None
