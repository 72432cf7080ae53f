"""Models from a Hugging Face folder or from the user's own factory; never with random or missing weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.digest import FolderError, weight_files
from quant.experts import fused_projections
from quant.safetensors_header import read_header
from sensitivity.catalog import TASKS
from sensitivity.diffusers_models import diffusers_class, load_class, quiet
from sensitivity.errors import BadModel, ModelAlreadyQuantized, NonFiniteWeights, SessionError
from sensitivity.memory import PIECE
from sensitivity.spec import ModelSource
from sensitivity.user_code import imported

DIGEST_LENGTH = 64
"""Hexadecimal digits of a SHA-256; a shorter digest is a name that says nothing about the weights."""

_AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
    "sequence_embedding": "AutoModel",
    "generic": "AutoModel",
}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TASK_SUFFIXES = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForImageClassification": "image_classification",
    "Model": "sequence_embedding",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients, and the task it is for."""

    model: nn.Module
    task: str


def available_device(name: str) -> torch.device:
    """The device of that name. Raises SessionError where this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SessionError(f"device must be available. Got {name!r}: {error!s:.200}. Use cpu.") from error
    return device


def load_model(source: ModelSource, task: str, device: torch.device) -> LoadedModel:
    """The model of `source` on `device`, in the precision it is stored in.

    Raises BadModel naming missing, unexpected or mismatched tensors, and NonFiniteWeights.
    """
    loaded = _from_folder(source, task) if source.kind == "folder" else _from_factory(source, task)
    require_finite_weights(loaded.model)
    compute_experts_in_turn(loaded.model)
    loaded.model.eval().requires_grad_(False).to(device)
    return loaded


def compute_experts_in_turn(model: nn.Module) -> None:
    """Have transformers multiply expert by expert: its batched kernels cannot be differentiated twice."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if fused_projections(module) and getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]


def load_skeleton(folder: Path | str) -> nn.Module:
    """The model of a folder on the meta device: its modules and shapes, ties included, without its weights.

    Raises BadModel as `load_model` does.
    """
    return _from_folder(ModelSource("folder", str(folder), ""), "auto", device_map="meta").model.eval()


def require_finite_weights(model: nn.Module) -> None:
    """Raises NonFiniteWeights naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        pieces = torch.split(parameter.detach().reshape(-1), PIECE) if parameter.is_floating_point() else ()
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
            raise NonFiniteWeights(
                f"weights must be finite. Got NaN or infinity in {name!r}. Export them again."
            )


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model without files: its modules as printed, and everything it stores, by name.

    >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> model_digest(first) == model_digest(first), model_digest(first) == model_digest(second)
    (True, False)
    """
    state = sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(memoryview(values.numpy()))
    return state.hexdigest()


# -- folder ---------------------------------------------------------------------------------------


def _from_folder(source: ModelSource, task: str, **options: Any) -> LoadedModel:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(source.location)
    files = _weight_files(folder)
    raw = _read_raw_config(folder)
    _refuse_integer_weights(files)
    if (diffusers := diffusers_class(raw)) is not None:
        return LoadedModel(
            _noise_predictor(diffusers, folder, files, raw, **options), _task_of_diffusers(task)
        )
    import transformers

    config = _read_config(folder)
    resolved = task_of(config) if task == "auto" else task
    if _stays_own_class(config, task):
        loader = getattr(transformers, config.architectures[0])
    else:
        loader = getattr(transformers, _auto_class(resolved))
    model = _load_strictly(loader, folder, dtype="auto", trust_remote_code=False, **options)
    if hasattr(config_of_model := model.config, "use_cache"):
        config_of_model.use_cache = False
    return LoadedModel(model, resolved)


def _auto_class(task: str) -> str:
    if task not in _AUTO_CLASSES:
        raise BadModel(f"task {task} needs a model of the diffusers library. Got one of transformers.")
    return _AUTO_CLASSES[task]


def _task_of_diffusers(task: str) -> str:
    if task not in ("auto", "diffusion", "generic"):
        raise BadModel(f"a model of the diffusers library is for task diffusion or generic. Got {task!r}.")
    return "diffusion" if task == "auto" else task


def _noise_predictor(
    name: str, folder: Path, files: list[Path], config: Any, device_map: str | None = None
) -> nn.Module:
    """A model of the diffusers library in the precision it is stored in; on "meta" without its weights."""
    loader = load_class(name)
    if device_map == "meta":
        model = _on_meta(loader, config)
        _require_held(model, files)
        return model
    stored = {dtype for file in files for _, dtype in _stored_types(file) if dtype in _FLOATS}
    dtype = _FLOATS[stored.pop()] if len(stored) == 1 else torch.float32
    with quiet():
        return _load_strictly(loader, folder, torch_dtype=dtype)


def _on_meta(loader: Any, config: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = loader.from_config(config)
    except Exception as error:
        raise BadModel(f"config.json must describe a {loader.__name__}. Got {error!s:.300}.") from error
    return model


def _require_held(model: nn.Module, files: list[Path]) -> None:
    """Raises BadModel where a skeleton has more weights than the files hold, before any is allocated."""
    shapes = {name: entry.shape for file in files for name, entry in read_header(file).tensors.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if sum(map(prod, wanted.values())) > sum(map(prod, shapes.values())):
        lacking = [name for name, shape in wanted.items() if shapes.get(name) != shape]
        _refuse("be in the folder's weights with the shape that config.json says", lacking)


def _weight_files(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in weight_files(folder)]
    except FolderError as error:
        raise BadModel(str(error)) from error


def _read_raw_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"config.json must be JSON. Got {error!s:.300}.") from error
    if not isinstance(raw, dict):
        raise BadModel(f"config.json must be an object. Got {type(raw).__name__}.")
    if "auto_map" in raw:
        raise BadModel("config.json must not hold auto_map. Got remote code, which is never run.")
    if raw.get("quantization_config"):
        raise ModelAlreadyQuantized(
            "the model must be at full precision. Got a quantization_config: send the original."
        )
    return raw


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadModel(f"config.json must describe a model of transformers. Got {error!s:.300}.") from error


def _refuse_integer_weights(files: list[Path]) -> None:
    """Integers and 8-bit floats would be read as if they were weights."""
    for file in files:
        for name, dtype in _stored_types(file):
            if name.endswith("weight") and dtype not in _FLOATS:
                raise ModelAlreadyQuantized(
                    f"the model must be at full precision. Got {dtype} in {name!r}: send the original."
                )


def _stored_types(file: Path) -> list[tuple[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return [(name, tensors.get_slice(name).get_dtype()) for name in tensors.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{file.name} must be a safetensors file. Got {error!s:.200}.") from error


def task_of(config: Any) -> str:
    """The task that the first architecture of a configuration is for; generic when it is not clear."""
    name = (getattr(config, "architectures", None) or [""])[0]
    task = next((task for suffix, task in _TASK_SUFFIXES.items() if name.endswith(suffix)), "generic")
    if task == "sequence_embedding" and not hasattr(config, "vocab_size"):
        return "generic"
    return task


def _stays_own_class(config: Any, task: str) -> bool:
    """Whether the class in `architectures` serves the task: always when the task is auto or generic."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    known = isinstance(getattr(transformers, name, None), type) if name else False
    return known and (task in ("auto", "generic") or task == task_of(config))


def _load_strictly(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Load and refuse every difference between configuration and file, by name."""
    level = _quiet()
    try:
        model, report = loader.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise BadModel(f"the model folder must load. Got {type(error).__name__}: {error!s:.300}.") from error
    finally:
        _restore(level)
    mismatched = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())]
    _refuse("have the shape that config.json says", mismatched)
    _refuse("be in the folder's weights", report["missing_keys"])
    _refuse("be known to the model's configuration", report["unexpected_keys"])
    if not isinstance(model, nn.Module):
        raise BadModel(f"the model folder must hold a torch module. Got {type(model).__name__}.")
    return model


def _refuse(must: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise BadModel(f"all tensors must {must}. Got {', '.join(found[:5])}{more} otherwise.")


def _quiet() -> int:
    from transformers.utils import logging

    level = int(logging.get_verbosity())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return level


def _restore(level: int) -> None:
    from transformers.utils import logging

    logging.set_verbosity(level)


# -- factory --------------------------------------------------------------------------------------


def _from_factory(source: ModelSource, task: str) -> LoadedModel:
    model = _called(imported(source.location, "factory", BadModel), source.location)
    if not isinstance(model, nn.Module):
        raise BadModel(f"factory {source.location!r} must return an nn.Module. Got {type(model).__name__}.")
    _require_same_weights(model, source)
    config = getattr(model, "config", None)
    resolved = (task_of(config) if config is not None else "generic") if task == "auto" else task
    return LoadedModel(model, resolved if resolved in TASKS else "generic")


def _require_same_weights(model: nn.Module, source: ModelSource) -> None:
    """Workers that each drew their own random weights would measure different models."""
    known = len(source.digest) == DIGEST_LENGTH
    if known and model_digest(model) != source.digest:
        raise BadModel(
            f"factory {source.location!r} must return the same weights each time. Got other ones. "
            "Load them from a file, or seed the generator."
        )


def _called(factory: Any, location: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise BadModel(
            f"factory {location!r} must work without arguments. Got {type(error).__name__}: {error!s:.300}."
        ) from error
