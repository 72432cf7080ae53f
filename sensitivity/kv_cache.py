"""Runs of a generating model whose keys and values are rounded as they enter its cache.

The model gets a transformers cache that rounds in `update`, so attention sees what a cache of that type
holds, of the current tokens too, as kernels that read the cache do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from quant.codecs.kv_cache import round_cached
from quant.geometry import CACHE_BITS, Geometry, geometry_of
from quant.kv_cache import FULL, cache_type_of
from quant.patterns import PatternError, select
from sensitivity.errors import BadUnit


def attention_layers(model: nn.Module) -> dict[str, int]:
    """Module path -> number in the cache, of every attention layer that transformers numbers."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if type(number) is int and "attention" in type(module).__name__.lower():
            found.setdefault(number, path)
    return {path: number for number, path in sorted(found.items())}


def model_geometry(model: nn.Module) -> Geometry | None:
    """The geometry that the model's configuration names, with its attention layers where every one of them
    has a cache of its own that can be rounded.
    """
    config: Any = getattr(model, "config", None)
    found = geometry_of(config.to_dict()) if hasattr(config, "to_dict") else None
    if found is None:
        return None
    layers = {} if _latent(model) or not _generates(model) else attention_layers(model)
    numbered = tuple(layers.values()) == tuple(range(len(found.windows)))
    return replace(found, attention=tuple(layers) if numbered else ())


def geometry_json(model: nn.Module) -> dict[str, Any] | None:
    """`model_geometry` as facts of an inspection."""
    found = model_geometry(model)
    return None if found is None else found.as_json()


@contextmanager
def rounded_cache(model: nn.Module, kinds: Mapping[str, str]) -> Iterator[None]:
    """Keys and values of the layers that `kinds` names are rounded in the block.

    `kinds`: name or pattern of attention layers -> `kv-full`, or `kv-` and a key of CACHE_BITS; of several
    that match the last one in alphabetical order counts, so a name beats `*`. Raises BadUnit for unknown
    ones, and when a run does not pass a layer's keys and values through the cache.
    """
    chosen = _chosen(model, kinds)
    with ExitStack() as stack:
        if chosen:
            seen: set[int] = set()
            before = model.register_forward_pre_hook(_give_cache(model, chosen, seen), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(model.register_forward_hook(_require_used(chosen, seen)).remove)
        yield


def _chosen(model: nn.Module, kinds: Mapping[str, str]) -> dict[int, str]:
    """Number in the cache -> type."""
    if not kinds:
        return {}
    chosen: dict[int, str] = {}
    layers = attention_layers(model) if _generates(model) else {}
    if not layers or _latent(model):
        got = "latent attention, whose runtimes keep another vector" if layers else "none"
        raise BadUnit(
            "a cache must be of a model that generates, with transformers' attention layers."
            f" Got {got}. Leave it as it is."
        )
    for pattern, scheme in sorted(kinds.items()):
        kind = cache_type_of(scheme)
        if kind not in (FULL, *CACHE_BITS):
            known = ", ".join((FULL, *CACHE_BITS))
            raise BadUnit(f"type of a cache must be one of {known}. Got {kind!r}. Use int8.")
        try:
            chosen |= {layers[name]: kind for name in select([pattern], layers)}
        except PatternError as error:
            raise BadUnit(str(error)) from error
    return {number: kind for number, kind in chosen.items() if kind != FULL}


def _latent(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "kv_lora_rank", None))


def _generates(model: nn.Module) -> bool:
    asked = getattr(model, "can_generate", None)
    return asked is not None and bool(asked())


def _give_cache(model: nn.Module, chosen: Mapping[int, str], seen: set[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        from transformers import DynamicCache

        seen.clear()
        cache = DynamicCache(config=model.config)
        keep = cache.update

        def update(keys: Any, values: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
            kind = chosen.get(layer_idx)
            if kind is not None:
                seen.add(layer_idx)
                keys, values = round_cached(keys, kind), round_cached(values, kind)
            return keep(keys, values, layer_idx, *rest, **more)

        cache.update = update
        return arguments, {**named, "past_key_values": cache, "use_cache": True}

    return hook


def _require_used(chosen: Mapping[int, str], seen: set[int]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if set(chosen) - seen:
            raise BadUnit(
                f"keys and values of layer {min(set(chosen) - seen)} must pass through the cache. Got a run"
                " that did not put them there. Leave its cache as it is."
            )

    return hook
