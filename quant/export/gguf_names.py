"""Architectures and tensor names of GGUF files, from the tables of the `gguf` package. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

from quant.export.protocol import ExportError

OTHER_NAMES = {
    "camembert": "bert",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "distilbert": "bert",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_bigcode": "starcoder",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "roberta": "bert",
    "umt5": "t5",
    "xlm-roberta": "bert",
}
"""`model_type` of transformers -> architecture of GGUF, where more than dashes differ."""
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TASK_PREFIXES = ("bert.", "roberta.", "distilbert.")
"""What task models put before the paths of a base model whose paths the tables know."""


def gguf_library() -> ModuleType:
    """The `gguf` package. Raises ExportError where it is not installed."""
    try:
        return import_module("gguf")
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Tensor names of GGUF must come from the gguf package. Got no module {error.name!r}."
            " Install bitplan[exports]."
        ) from error


def architecture(config: Mapping[str, Any]) -> str | None:
    """The GGUF architecture of a `config.json`, or None where GGUF has none for its `model_type`.

    >>> architecture({"model_type": "mistral"}), architecture({"model_type": "qwen3_moe"})
    ('llama', 'qwen3moe')
    """
    kind = str(config.get("model_type"))
    offered = {_plain(name): name for name in gguf_library().MODEL_ARCH_NAMES.values()}
    return OTHER_NAMES.get(kind, offered.get(_plain(kind)))


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def block_count(config: Mapping[str, Any]) -> int | None:
    """How many blocks a `config.json` says that the model has."""
    return next((config[key] for key in BLOCKS if isinstance(config.get(key), int)), None)


def tensor_names(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Module path -> names of its weight in GGUF, without modules that GGUF has no tensor for.

    Joined gate and up projections of experts are two tensors there, or one: all names are given.

    >>> tensor_names({"model_type": "llama", "num_hidden_layers": 1}, ["model.layers.0.mlp.down_proj"])
    {'model.layers.0.mlp.down_proj': ('blk.0.ffn_down.weight',)}
    """
    paths = {module: _paths(module) for module in modules}
    names = module_names(config, [path for several in paths.values() for path in several])
    found = {
        module: tuple(dict.fromkeys(f"{names[path]}.weight" for path in several if path in names))
        for module, several in paths.items()
    }
    return {module: several for module, several in found.items() if several}


def _paths(module: str) -> tuple[str, ...]:
    parent, _, last = module.rpartition(".")
    if parent.endswith("experts") and last == "gate_up_proj":
        return (f"{parent}.gate_proj", f"{parent}.up_proj", module)
    return (module,)


def module_names(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """Module path -> what the names of its tensors start with in GGUF ("blk.0.ffn_down")."""
    wanted, blocks = architecture(config), block_count(config)
    if wanted is None or blocks is None:
        return {}
    table = _table(wanted, blocks)
    found = {module: _first(table, module) for module in modules}
    return {module: name for module, name in found.items() if name is not None}


@lru_cache(maxsize=8)
def _table(wanted: str, blocks: int) -> Any:
    """The library's map of tensor names for an architecture and a number of blocks."""
    library = gguf_library()
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    return library.get_tensor_name_map(kinds[wanted], blocks)


def _first(table: Any, module: str) -> str | None:
    tails = [module.removeprefix(prefix) for prefix in TASK_PREFIXES if module.startswith(prefix)]
    names = (table.get_name(path) for path in (module, *tails, f"model.{module}"))
    return next((name for name in names if name is not None), None)
