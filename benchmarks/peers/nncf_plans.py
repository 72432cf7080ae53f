"""NNCF's mixed-precision weight compression: a share in one width, the rest in 8 bits.

It has no budget. Bits become a ratio for the two widest formats that reach them, three of its sensitivity
metrics order the layers, and the plan is the one whose compressed model, run by OpenVINO, has the lowest KL
to full precision on the samples: the best that its user could pick. It stops before the layer that would
reach the ratio, so a plan may have more bits than were asked for.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from asked import Asked, Scheme, timed
from plain import plain
from torch import Tensor

BACKUP_BITS = 8
WEIGHT = ".weight"
PREFIX = "self."
METRICS = ("weight_quantization_error", "max_activation_variance", "hessian_input_activation")
"""Its default without data, its default with data, and HAWQ's."""


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    asked = Asked.from_command()
    plans, seconds = timed(lambda: search(asked))
    asked.answer("nncf", plans, seconds)


def search(asked: Asked) -> dict[float, dict[str, str]]:
    """Budget -> layer -> scheme."""
    import openvino

    model = plain(asked)
    inputs = [model.first(batch[asked.inputs]) for batch in asked.batches()]
    with torch.no_grad():
        exact = [model(batch).log_softmax(-1) for batch in inputs]
    graph = openvino.convert_model(model, example_input=inputs[0])
    plans = {}
    for budget in asked.budgets:
        tried = {}
        for options in attempts(asked.schemes, budget):
            made = compressed(graph.clone(), asked, inputs, *options)
            tried[tuple(widths(made, asked).items())] = made
        plans[budget] = dict(min(tried, key=lambda plan: divergence(tried[plan], inputs, exact)))
    return plans


def attempts(schemes: list[Scheme], budget: float) -> Iterator[tuple[int, float, str]]:
    """Width, share of the weights that have it, and metric, for the two widest that reach the budget.

    >>> list(attempts([Scheme(f"w{bits}", bits, "channel") for bits in (3, 4, 8)], 4.0))[:2]
    [(3, 0.8, 'weight_quantization_error'), (3, 0.8, 'max_activation_variance')]
    """
    narrow = [scheme.bits for scheme in schemes if scheme.bits <= budget and scheme.bits < BACKUP_BITS]
    for bits in sorted(narrow)[-2:]:
        ratio = (BACKUP_BITS - budget) / (BACKUP_BITS - bits)
        for metric in METRICS[: 1 if ratio == 1 else None]:
            yield bits, ratio, metric


def compressed(graph: Any, asked: Asked, inputs: list[Tensor], bits: int, ratio: float, metric: str) -> Any:
    """The OpenVINO model with weights compressed; its last product is the head, which stays as it is."""
    import nncf

    free = metric == METRICS[0]
    head = [node.get_friendly_name() for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"][
        -1
    ]
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(f"int{bits}_sym"),
        ratio=ratio,
        group_size=-1,
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(names=[head]),
        dataset=None if free else nncf.Dataset([batch.numpy() for batch in inputs]),
        sensitivity_metric=nncf.SensitivityMetric(metric),
        backup_mode=nncf.BackupMode.INT8_SYM,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            statistics_path=None if free else str(asked.folder / "statistics")
        ),
    )


def divergence(made: Any, inputs: list[Tensor], exact: list[Tensor]) -> float:
    """Mean KL of the compressed model to full precision."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.compile_model(made, "CPU", options)
    total = 0.0
    for batch, wanted in zip(inputs, exact, strict=True):
        got = torch.from_numpy(run(batch.numpy())[0]).log_softmax(-1)
        total += float((wanted.exp() * (wanted - got)).sum(-1).mean())
    return total / len(inputs)


def widths(made: Any, asked: Asked) -> dict[str, str]:
    """Layer -> scheme of a compressed model, by the weights' element types. Exits if nothing is mixed."""
    names = {scheme.bits: scheme.name for scheme in asked.schemes}
    bits: dict[str, int] = {
        node.get_friendly_name().removeprefix(PREFIX).removesuffix(WEIGHT): node.get_element_type().bitwidth
        for node in made.get_ordered_ops()
        if node.get_type_name() == "Constant"
        and len(node.shape) > 1
        and node.get_element_type().is_integral()
    }
    if set(bits.values()) == {BACKUP_BITS}:
        sys.exit(f"keeps all {len(bits)} layers at {BACKUP_BITS} bits, whatever the ratio")
    return {layer: names[bits[layer]] for layer in asked.layers}


if __name__ == "__main__":
    main()
