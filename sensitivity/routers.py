"""Routers of mixture-of-experts models: what they said, and how many tokens each expert saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.experts import experts_of, fused_projections, routed
from sensitivity.inputs import real_tokens, without_padding
from sensitivity.tasks.task import Batch, PerSample

Logits = dict[str, Tensor]
"""Path of a router -> its logits (samples x tokens, experts) in float32."""


@contextmanager
def router_logits(model: nn.Module, paths: Iterable[str]) -> Iterator[Logits]:
    """What the routers at `paths` say while the block runs it; those that are not run are missing.

    Logits are computed from a router's inputs as it multiplies them, rounded or not, because routers return
    them in many forms.
    """
    said: Logits = {}
    handles = [
        model.get_submodule(path).register_forward_hook(_listener(path, said), with_kwargs=True)
        for path in paths
    ]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def router_divergence(reference: Logits, logits: Logits, batch: Batch) -> PerSample:
    """KL in nats of each router's distribution over experts from the reference, per sample (size,): the mean
    over its tokens and over all routers. A router that is missing in `logits` was not touched.
    """
    total = np.zeros(batch.size)
    for path, found in logits.items():
        expected = reference[path].double().log_softmax(-1)
        terms = functional.kl_div(found.double().log_softmax(-1), expected, log_target=True, reduction="none")
        total += _sample_means(terms.sum(-1).reshape(batch.size, -1), real_tokens(batch))
    return total / max(1, len(reference))


def _sample_means(values: Tensor, real: Tensor | None) -> PerSample:
    """Means over the real tokens of each sample; `values` (samples, tokens)."""
    if real is None or real.shape != values.shape:
        return values.mean(1).cpu().numpy()
    kept = real.to(values.device)
    return ((values * kept).sum(1) / kept.sum(1).clamp(min=1)).cpu().numpy()


def coverage(model: nn.Module, batches: Iterable[Batch]) -> dict[str, list[int]]:
    """Path of each module of experts -> how many tokens each of its experts saw; {} without experts."""
    counts: dict[str, list[int]] = {}
    places = {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "experts" and experts_of(module)
    }
    if not places:
        return {}
    with torch.no_grad():
        for batch in batches:
            with _counting(places, counts, real_tokens(batch)):
                batch.call(model)
    return counts


@contextmanager
def _counting(
    places: Mapping[str, nn.Module], counts: dict[str, list[int]], real: Tensor | None
) -> Iterator[None]:
    handles: list[Any] = []
    for path, module in places.items():
        seen = counts.setdefault(path, [0] * experts_of(module))
        if fused_projections(module):
            handles.append(module.register_forward_pre_hook(_fused(seen, real), with_kwargs=True))
        elif isinstance(module, nn.ModuleList):
            handles += [
                expert.register_forward_pre_hook(_single(seen, number))
                for number, expert in enumerate(module)
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fused(seen: list[int], real: Tensor | None) -> Callable[..., None]:
    def count(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = routed(module, arguments, named)
        if call is None:
            return
        indices = without_padding(call[1], real)
        for expert, tokens in enumerate(
            torch.bincount(indices[(indices >= 0) & (indices < len(seen))].flatten(), minlength=len(seen))
        ):
            seen[expert] += int(tokens)

    return count


def _single(seen: list[int], number: int) -> Callable[..., None]:
    def count(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[number] += arguments[0].shape[:-1].numel()

    return count


def _listener(path: str, said: Logits) -> Callable[..., None]:
    def listen(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
        given = (*arguments, *named.values())[0].detach()
        hidden = given.reshape(-1, given.shape[-1])
        bias = getattr(module, "bias", None)
        said[path] = functional.linear(
            hidden.float(), module.weight.float(), None if bias is None else bias.float()
        )

    return listen
