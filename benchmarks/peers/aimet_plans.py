"""AIMET's automatic mixed precision, weight-only: its greedy list of steps down from the widest format.

It has no budget but an allowed drop of a score, here the negative KL to full precision on the samples. Its
phase 1 orders the steps; a budget's plan is the first after which the average is no more. Phase 2 measures
points of this list and changes none, so it is left out.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from asked import Asked, Scheme, timed
from missing_operators import declare_missing_operators
from plain import PlainNorm, plain
from torch import nn

WIDE = 16
"""Bits of activations by name; their quantizers are taken away."""


def main() -> None:
    declare_missing_operators()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    asked = Asked.from_command()
    plans, seconds = timed(lambda: search(asked))
    asked.answer("aimet-torch", plans, seconds)


def search(asked: Asked) -> dict[float, dict[str, str]]:
    """Budget -> layer -> scheme."""
    from aimet_torch._base.amp.mixed_precision_algo import GreedyMixedPrecisionAlgo
    from aimet_torch.amp.utils import _mock_v1_quantizers
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import CallbackFunc, QuantizationDataType
    from aimet_torch.nn import QuantizationMixin
    from aimet_torch.quantsim import QuantizationSimModel

    model = plain(asked)
    inputs = [model.first(batch[asked.inputs]) for batch in asked.batches()]
    with torch.no_grad():
        exact = [model(batch).log_softmax(-1) for batch in inputs]
    if asked.kind == "cnn":
        fold_all_batch_norms(model, None, dummy_input=inputs[0])
    QuantizationMixin.ignore(PlainNorm)
    sim = QuantizationSimModel(model, inputs[0], default_param_bw=max(x.bits for x in asked.schemes))
    weights_alone(sim, asked.layers)

    def score(model: nn.Module, _: object) -> float:
        with torch.no_grad():
            losses = [
                float((wanted.exp() * (wanted - model(batch).log_softmax(-1))).sum(-1).mean())
                for batch, wanted in zip(inputs, exact, strict=True)
            ]
        return -sum(losses) / len(losses)

    kind = QuantizationDataType.int
    candidates = [((WIDE, kind), (scheme.bits, kind)) for scheme in asked.schemes]
    callback = CallbackFunc(score)
    with _mock_v1_quantizers(sim):
        algorithm = GreedyMixedPrecisionAlgo(
            sim,
            inputs[0],
            candidates,
            callback,
            callback,
            str(asked.folder),
            clean_start=True,
            forward_pass_callback=CallbackFunc(lambda *_: None),
            use_all_amp_candidates=True,
        )
        baseline = candidates[-1]
        algorithm.set_baseline(0.0, baseline)
        steps = algorithm._create_and_save_accuracy_list(baseline)
    order = [(group.parameter_quantizers, candidate[1][0]) for group, candidate, *_ in steps]
    sizes = {layer: model.get_submodule(layer).weight.numel() for layer in asked.layers}
    return chosen(asked.schemes, sizes, order, asked.budgets)


def weights_alone(sim: Any, layers: list[str]) -> None:
    """No quantizer but those of the layers' weights, each with a scale per output channel."""
    for name, module in sim.named_qmodules():
        for quantizers in (module.input_quantizers, module.output_quantizers):
            for index in range(len(quantizers)):
                quantizers[index] = None
        for parameter in list(module.param_quantizers):
            if name not in layers or parameter != "weight":
                module.param_quantizers[parameter] = None


def chosen(
    schemes: list[Scheme],
    sizes: dict[str, int],
    steps: list[tuple[tuple[str, ...], int]],
    budgets: list[float],
) -> dict[float, dict[str, str]]:
    """Steps (layers, bits) down from the widest scheme until the average is the budget.

    >>> schemes = [Scheme(f"w{bits}", bits, "channel") for bits in (2, 8)]
    >>> chosen(schemes, {"a": 1, "b": 1}, [(("b",), 2), (("a",), 2)], [5.0])
    {5.0: {'a': 'w8', 'b': 'w2'}}
    """
    names = {scheme.bits: scheme.name for scheme in schemes}
    plans = {}
    for budget in budgets:
        bits = dict.fromkeys(sizes, max(names))
        for layers, width in steps:
            if sum(sizes[layer] * bits[layer] for layer in sizes) <= budget * sum(sizes.values()):
                break
            bits |= dict.fromkeys(layers, width)
        plans[budget] = {layer: names[width] for layer, width in bits.items()}
    return plans


if __name__ == "__main__":
    main()
