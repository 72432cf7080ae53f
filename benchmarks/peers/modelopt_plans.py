"""ModelOpt's auto_quantize: one scoring, then its own search for each budget of effective bits.

`option` is "gradient" or "kl_div"; with "untied" its rules that tie q/k/v and gate/up are taken away, with
"max" weights are scaled by their maxima, its default, and not by its `mse` calibration, the nearest that it
has to our quantizer. Formats are weight-only, and "do not quantize" is not allowed: the menu is ours.
"""

from __future__ import annotations

import warnings
from typing import Any

from asked import WHOLE_ROWS, WHOLE_TENSOR, Asked, Scheme, timed

WHOLE_BITS = 16
LOOSE = 15.0
"""Effective bits that anything fits in."""


def main() -> None:
    warnings.simplefilter("ignore")
    asked = Asked.from_command()
    plans, seconds = timed(lambda: search(asked))
    asked.answer("nvidia-modelopt", plans, seconds)


def config(scheme: Scheme, calibration: str = "mse") -> dict[str, Any]:
    """The format as ModelOpt writes it."""
    weight: dict[str, Any] = {"num_bits": scheme.bits}
    if scheme.group == WHOLE_ROWS:
        weight["axis"] = 0
    elif scheme.group == WHOLE_TENSOR:
        weight["axis"] = None
    else:
        weight["block_sizes"] = {-1: scheme.group}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": calibration,
    }


def search(asked: Asked) -> dict[float, dict[str, str]]:
    """Budget -> layer -> scheme."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    method, *words = asked.option.split()
    if "untied" in words:
        algorithms._AutoQuantizeBaseSearcher.quant_grouping_rules = []
    model, batches = asked.model(), asked.batches()
    others = [
        name
        for name, module in model.named_modules()
        if name not in asked.layers and hasattr(module, "weight")
    ]
    formats = [config(scheme, "max" if "max" in words else "mse") for scheme in asked.schemes]
    losses = {"loss_func": asked.loss} if method == "gradient" else {}
    model, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": LOOSE},
        quantization_formats=formats,
        module_search_spaces=[
            {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": False}
        ],
        data_loader=batches,
        forward_step=asked.logits,
        disabled_layers=others,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method=method,
        **losses,
    )
    weights = sum(model.get_submodule(layer).weight.numel() for layer in asked.layers)
    total = state["cost_denominator"]
    return {budget: plan(asked, state, effective_bits(budget, weights, total)) for budget in asked.budgets}


def effective_bits(budget: float, weights: float, total: float) -> float:
    """ModelOpt's average, in which what is disabled (total - weights) counts with its 16 bits."""
    return (budget * weights + WHOLE_BITS * (total - weights)) / total


def plan(asked: Asked, state: dict[str, Any], budget: float) -> dict[str, str]:
    """Layer -> scheme under a limit on effective bits, from the scores of the state."""
    from modelopt.torch.quantization.algorithms import get_auto_quantize_config

    suffix = ".weight_quantizer"
    return {
        entry["quantizer_name"].removesuffix(suffix): named(asked.schemes, entry["cfg"])
        for entry in get_auto_quantize_config(state, {"effective_bits": budget})["quant_cfg"]
        if entry["quantizer_name"].endswith(suffix) and "cfg" in entry
    }


def named(schemes: list[Scheme], weight: dict[str, Any]) -> str:
    """The scheme whose weights ModelOpt describes so."""
    blocks = weight.get("block_sizes") or {}
    axis = {0: WHOLE_ROWS, None: WHOLE_TENSOR}[weight.get("axis")]
    group = blocks.get(-1, axis)
    return next(x.name for x in schemes if (x.bits, x.group) == (weight["num_bits"], group))


if __name__ == "__main__":
    main()
