"""One call that loads what was written here: the model with its plan's weights, and the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.checkpoints import packed, torchao, vllm
from quant.checkpoints.joined import transformers_config
from quant.checkpoints.protocol import PLAN_FILE, CheckpointError
from quant.checkpoints.source import Source
from quant.digest import DIFFUSERS_CLASS
from quant.plan import Plan, parse_plan


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in eval mode whose weights are dequantized, and the plan that they were written from."""

    model: nn.Module
    plan: Plan


def load_checkpoint(folder: Path | str) -> LoadedCheckpoint:
    """The model of a folder that `bitplan checkpoint` or `bitplan apply` wrote, by the class it was saved as.

    Packed weights are dequantized by the consumer's own library, into the type the model is stored in, those
    of `pytorch-packed` into the very tensors that `pytorch` holds. No code of the folder is run. Raises
    CheckpointError where the folder was not written here, or its tensors are not those of the model, and
    PlanError where its plan is not valid.
    """
    source = Source.open(folder)
    plan = _plan(source.folder)
    state = _state(source, plan)
    dtype = next((state[name].dtype for name in sorted(state) if state[name].is_floating_point()), None)
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
    told = source.config["quantization_config"]
    method = told.get("quant_method") if isinstance(told, dict) else None
    if method == packed.METHOD:
        return {name: tensor for name, _, tensor in packed.unpacked(source, plan)}
    own = getattr(torch, str(source.config.get("dtype", source.config.get("torch_dtype", "float32"))))
    unpacked = torchao.unpacked if method == "torchao" else vllm.unpacked
    return {
        name: tensor if layer is None else tensor.to(own) for name, layer, tensor in unpacked(source, plan)
    }


def _model(source: Source, state: dict[str, Tensor], dtype: Any) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "auto_map" in source.config:
        raise CheckpointError("config.json must not hold auto_map. Got remote code, which is never run.")
    build = _of_diffusers if DIFFUSERS_CLASS in source.config else _of_transformers
    model, wrong = build(source, state, dtype)
    if wrong:
        raise CheckpointError(
            f"Tensors must be those of {type(model).__name__}. Got {', '.join(sorted(wrong)[:3])} otherwise"
            f" ({len(wrong)} in all). Write the checkpoint again."
        )
    return model


def _of_transformers(source: Source, state: dict[str, Tensor], dtype: Any) -> tuple[nn.Module, set[str]]:
    """The model, and the tensors that are missing or unexpected."""
    import transformers

    config = transformers_config(source.folder)
    config.quantization_config = None
    kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    return model, {*report["missing_keys"], *report["unexpected_keys"]}


def _of_diffusers(source: Source, state: dict[str, Tensor], dtype: Any) -> tuple[nn.Module, set[str]]:
    """The same by the class that a diffusers config.json names."""
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(
            "A model of diffusers must be loaded by that library. Got none installed. Install"
            " bitplan[diffusion]."
        ) from error
    name = str(source.config[DIFFUSERS_CLASS])
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise CheckpointError(
            f"{DIFFUSERS_CLASS} must name a model of diffusers. Got {name[:60]!r}. Save the model again with"
            " save_pretrained()."
        )
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    model: Any = getattr(diffusers, name).from_config(config)
    report = model.to(dtype).load_state_dict(state, strict=False)
    return model, {*report.missing_keys, *report.unexpected_keys}
