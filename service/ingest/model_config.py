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
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation_internal"})
_COUNTS = ("num_", "n_")
_SIZES = ("_size", "_dim", "_positions", "_length", "_channels")


def check_config(config: Mapping[str, Any]) -> str:
    """The `model_type` of a sound config.json, or the class that diffusers builds from it; raises
    Unprocessable with what is wrong and what to send.

    >>> check_config({"model_type": "llama", "hidden_size": 64}), check_config({"_class_name": "UNet2DModel"})
    ('llama', 'UNet2DModel')
    """
    _refuse_code(config)
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


def _refuse_code(config: Mapping[str, Any]) -> None:
    for path, value in _members(config):
        key = path[-1]
        if key in _CODE_KEYS or (isinstance(value, str) and key == "_attn_implementation" and "/" in value):
            raise Unprocessable(
                "remote-code",
                f"config.json must not ask for code of its own. Got {key!r}. Convert the model to a class "
                "of the transformers library, or run bitplan on your own machine with --factory "
                "package.module:function.",
                pointer=json_pointer(*path),
            )


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
        key = str(path[-1])
        if type(value) is not int or not (key.startswith(_COUNTS) or key.endswith(_SIZES)):
            continue
        most = MOST_LAYERS if "layers" in key or "blocks" in key else LARGEST_SIZE
        if not -1 <= value <= most:  # -1 stands for "none" in several architectures
            raise Unprocessable(
                "invalid-config",
                f"{key} in config.json must be from 0 to {most}. Got {str(value)[:40]}. "
                "Send the config.json that belongs to the weights.",
                pointer=json_pointer(*path),
            )


def _members(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every member of nested objects and lists with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in pairs:
        yield (*path, key), member
        yield from _members(member, (*path, key))
