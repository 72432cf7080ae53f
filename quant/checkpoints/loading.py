"""One call that loads what was written here: the model with its plan's weights, and the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.checkpoints import torchao, vllm
from quant.checkpoints.protocol import PLAN_FILE, CheckpointError
from quant.checkpoints.source import Source
from quant.plan import Plan, parse_plan


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in eval mode whose weights are dequantized, and the plan that they were written from."""

    model: nn.Module
    plan: Plan


def load_checkpoint(folder: Path | str) -> LoadedCheckpoint:
    """The model of a folder that `bitplan checkpoint` or `bitplan apply` wrote, by the class it was saved as.

    Packed weights are dequantized by the consumer's own library, into the type the model is stored in; no
    code of the folder is run. Raises CheckpointError where the folder was not written here, or its tensors
    are not those of the model; PlanError where its plan is not valid.
    """
    source = Source.open(folder)
    plan = _plan(source.folder)
    state = _state(source, plan)
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    return LoadedCheckpoint(_model(source, state, dtype).eval(), plan)


def _plan(folder: Path) -> Plan:
    try:
        return parse_plan((folder / PLAN_FILE).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"Folder must hold {PLAN_FILE}. Got {str(folder)!r} without it. Write it with bitplan checkpoint."
        ) from error


def _state(source: Source, plan: Plan) -> dict[str, Tensor]:
    """Tensor name -> values; what was packed comes in the type of the others."""
    if "quantization_config" not in source.config:
        state: dict[str, Tensor] = {}
        for file in source.headers:
            state |= load_file(source.folder / file)
        return state
    own = getattr(torch, str(source.config.get("dtype", source.config.get("torch_dtype", "float32"))))
    method = source.config["quantization_config"].get("quant_method")
    unpacked = torchao.unpacked if method == "torchao" else vllm.unpacked
    return {
        name: tensor if layer is None else tensor.to(own) for name, layer, tensor in unpacked(source, plan)
    }


def _model(source: Source, state: dict[str, Tensor], dtype: Any) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    if "auto_map" in source.config:
        raise CheckpointError("config.json must not hold auto_map. Got remote code, which is never run.")
    config = transformers.AutoConfig.from_pretrained(str(source.folder), local_files_only=True)
    config.quantization_config = None
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, transformers.AutoModel)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise CheckpointError(
            f"Tensors must be those of {name}. Got {', '.join(wrong[:3])} otherwise ({len(wrong)} in all)."
            " Write the checkpoint again."
        )
    found: nn.Module = model
    return found
