"""One call that loads what was written here: the model with its plan's weights, and the plan."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from quant.catalog import CHECKPOINTS
from quant.checkpoints.front import plan_deployment
from quant.checkpoints.protocol import PLAN_FILE, PROVENANCE_FILE, CheckpointError
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
    plan, consumer = _told(source.folder)
    state, dtype = _state(source, plan, consumer)
    return LoadedCheckpoint(_model(source, state, dtype).eval(), plan)


def _told(folder: Path) -> tuple[Plan, str]:
    try:
        text = (folder / PLAN_FILE).read_bytes()
        consumer = json.loads((folder / PROVENANCE_FILE).read_bytes())["consumer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Folder must hold {PLAN_FILE} and {PROVENANCE_FILE}. Got {str(folder)!r}: {error}."
            " Write it with bitplan checkpoint."
        ) from error
    if consumer not in CHECKPOINTS or CHECKPOINTS[consumer].writes != "folder":
        raise CheckpointError(f"{PROVENANCE_FILE} must name a consumer of folders. Got {consumer!r:.60}.")
    return parse_plan(text), consumer


def _state(source: Source, plan: Plan, consumer: str) -> tuple[dict[str, Tensor], Any]:
    """Tensor name -> values, and the type of those that are not packed."""
    keys = source.keys(plan)
    planned = {key for names in keys.values() for key in names}
    state: dict[str, Tensor] = {}
    for file, header in source.headers.items():
        with safe_open(source.folder / file, framework="pt") as tensors:
            for name in header.tensors:
                if name.rpartition(".weight")[0] not in planned:
                    state[name] = tensors.get_tensor(name)
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    module = CHECKPOINTS[consumer].load()
    for layer, weight in module.read_back(source.folder, plan_deployment(plan, source)):
        state |= {f"{key}.weight": weight.to(dtype or weight.dtype) for key in keys[layer]}
    return state, dtype


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
