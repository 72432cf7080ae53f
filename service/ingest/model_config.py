"""config.json before anything is built from it: no program, no quantized weights, no absurd sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quant.digest import DIFFUSERS_CLASS
from sensitivity.diffusers_models import diffusers_class
from sensitivity.errors import BadModel
from service.errors import Unprocessable, json_pointer

LARGEST_SIZE = 2**26  # of one dimension: a vocabulary or hidden size beyond 67 million is no model
MOST_LAYERS = 20_000
_CODE_KEYS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
    }
)
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Members that name a kernel; one with a slash or colon is downloaded and run."""
_COUNTS = ("num_", "n_", "d_")
_SIZES = frozenset({"size", "sizes", "dim", "dims", "positions", "embeddings", "length", "channels"})
_LAYERS = frozenset({"layers", "blocks", "depth", "depths", "layer", "block"})


def check_config(config: Mapping[str, Any]) -> str:
    """The `model_type` of a sound config.json, or the class that diffusers builds from it; raises
    Unprocessable with what is wrong and what to send.

    >>> check_config({"model_type": "llama", "hidden_size": 64}), check_config({"_class_name": "UNet2DModel"})
    ('llama', 'UNet2DModel')
    """
    refuse_code(config, "config.json")
    _refuse_quantized(config)
    model_type = _diffusers_class(config) or config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise Unprocessable(
            "invalid-config",
            f"config.json must have a model_type such as 'llama' or 'resnet'. Got {model_type!r}. "
            "Send the config.json that model.save_pretrained(folder) writes.",
            pointer="/model_type",
        )
    _refuse_absurd(config)
    return model_type


def _diffusers_class(config: Mapping[str, Any]) -> str | None:
    try:
        return diffusers_class(config)
    except BadModel as error:
        raise Unprocessable("invalid-config", str(error), pointer=json_pointer(DIFFUSERS_CLASS)) from None


def refuse_code(config: Mapping[str, Any], name: str) -> None:
    """Raise Unprocessable `remote-code` for the first member of the file `name` that would have code run."""
    for path, value in _members(config):
        if path[-1] in _CODE_KEYS or _names_a_kernel(path, value):
            raise Unprocessable(
                "remote-code",
                f"{name} must not ask for code of its own. Got {path[-1]!r}. Convert the model to a class "
                "of the transformers library, or run bitplan on your own machine with --factory "
                "package.module:function.",
                pointer=json_pointer(*path),
            )


def _names_a_kernel(path: tuple[str | int, ...], value: Any) -> bool:
    chosen = any(isinstance(key, str) and key.lstrip("_") in _IMPLEMENTATIONS for key in path)
    return chosen and isinstance(value, str) and not value.replace("_", "").isalnum()


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    for path, value in _members(config):
        if path[-1] in {"quantization_config", "quantization"} and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise already_quantized(f"{path[-1]} ({method or 'method not named'}) in config.json", path)


def already_quantized(reason: str, path: tuple[str | int, ...] = ()) -> Unprocessable:
    """The problem for a model whose weights are quantized: a second quantization would measure the first."""
    return Unprocessable(
        "already-quantized",
        f"A model must have its original floating-point weights. Got {reason}. Send the original model.",
        pointer=json_pointer(*path) if path else None,
    )


def _refuse_absurd(config: Mapping[str, Any]) -> None:
    for path, value in _members(config):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        most = _most(key)
        if type(value) not in (int, float) or most is None:
            continue
        if not -1 <= value <= most:  # -1 stands for "none" in several architectures
            raise Unprocessable(
                "invalid-config",
                f"{key} in config.json must be from 0 to {most}. Got {str(value)[:40]}. "
                "Send the config.json that belongs to the weights.",
                pointer=json_pointer(*path),
            )


def _most(key: str) -> int | None:
    """The largest value of a member of this name; None for one that is no size.

    >>> _most("num_hidden_layers"), _most("d_model") == LARGEST_SIZE, _most("vision_feature_layer")
    (20000, True, None)
    """
    words = key.split("_")
    if key.startswith(_COUNTS) or words[-1] in {"layers", "blocks", "depth", "depths"}:
        return LARGEST_SIZE if _LAYERS.isdisjoint(words) else MOST_LAYERS
    return LARGEST_SIZE if words[-1] in _SIZES else None


def _members(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every member of nested objects and lists with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in pairs:
        yield (*path, key), member
        yield from _members(member, (*path, key))
