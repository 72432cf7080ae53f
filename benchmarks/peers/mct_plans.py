"""Sony's Model Compression Toolkit: weight-only mixed precision, one scoring, then its program per budget.

`option` says how its distances at inner points are weighted: "average", its default, or "hessian". Its
function scores anew for each budget; scores know nothing of the budget, so the first ones are kept. Its
tracer cannot follow transformers' own forward passes: it gets plain.py's, around the same modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asked import Asked, Scheme, timed
from missing_operators import declare_missing_operators
from plain import plain

BITS_IN_A_BYTE = 8
WIDE = 16
FOLDED = "_bn"
IMAGES = {"lm": 32, "cnn": 256}
"""Samples that scores are of: all images, and as many sequences as it takes by default (half of them)."""


def main() -> None:
    declare_missing_operators()
    asked = Asked.from_command()
    plans, seconds = timed(lambda: search(asked))
    asked.answer("model-compression-toolkit", plans, seconds)


def platform(schemes: list[Scheme]) -> Any:
    """A target whose convolutions and linear layers have any width of the menu, and nothing else changes."""
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

    def attribute(bits: int, enabled: bool) -> Any:
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=bits,
            weights_per_channel_threshold=True,
            enable_weights_quantization=enabled,
        )

    def operator(kernel: Any) -> Any:
        return schema.OpQuantizationConfig(
            default_weight_attr_config=attribute(WIDE, enabled=False),
            attr_weights_configs_mapping={} if kernel is None else {KERNEL_ATTR: kernel},
            activation_quantization_method=QuantizationMethod.POWER_OF_TWO,
            activation_n_bits=WIDE,
            supported_input_activation_n_bits=WIDE,
            enable_activation_quantization=False,
            quantization_preserving=False,
            fixed_scale=None,
            fixed_zero_point=None,
            simd_size=1,
            signedness=schema.Signedness.AUTO,
        )

    choices = [operator(attribute(scheme.bits, enabled=True)) for scheme in schemes]
    mixed = schema.QuantizationConfigOptions(
        quantization_configurations=tuple(choices), base_config=choices[-1]
    )
    names = (schema.OperatorSetNames.CONV, schema.OperatorSetNames.FULLY_CONNECTED)
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(operator(None),)),
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=mixed) for name in names),
        name="menu",
        add_metadata=False,
    )


def search(asked: Asked) -> dict[float, dict[str, str]]:
    """Budget -> layer -> scheme."""
    import model_compression_toolkit as mct

    keep_scores()
    weightings = mct.core.MpDistanceWeighting
    weighting = {"average": weightings.AVG, "hessian": weightings.HESSIAN}[asked.option]
    model = plain(asked)
    count = IMAGES[asked.kind]
    weights = sum(model.get_submodule(layer).weight.numel() for layer in asked.layers)

    def batches() -> Iterator[list[Any]]:
        for batch in asked.batches():
            yield [model.first(batch[asked.inputs]).numpy()]

    found = {}
    for budget in asked.budgets:
        made, _ = mct.ptq.pytorch_post_training_quantization(
            plain(asked),
            batches,
            target_resource_utilization=mct.core.ResourceUtilization(
                weights_memory=budget * weights / BITS_IN_A_BYTE
            ),
            core_config=mct.core.CoreConfig(
                mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(
                    num_of_images=count, distance_weighting_method=weighting
                )
            ),
            target_platform_capabilities=platform(asked.schemes),
        )
        found[budget] = widths(asked.schemes, asked.layers, made)
    return found


def keep_scores() -> None:
    """Score every candidate for the first budget only."""
    from model_compression_toolkit.core.common.mixed_precision import mixed_precision_search_manager

    manager = mixed_precision_search_manager.MixedPrecisionSearchManager
    score, kept = manager._build_sensitivity_mapping, {}

    def scores(self: Any) -> dict[Any, list[float]]:
        if not kept:
            kept.update({node.name: values for node, values in score(self).items()})
        return {node: kept[node.name] for node in self.mp_topo_configurable_nodes}

    manager._build_sensitivity_mapping = scores


def widths(schemes: list[Scheme], layers: list[str], made: Any) -> dict[str, str]:
    """Layer -> scheme of a quantized model: underscores for dots, and a mark where a norm is folded in."""
    named = {layer.replace(".", "_"): layer for layer in layers}
    bits: dict[str, int] = {
        named.get(name.removesuffix(FOLDED), name): module.weights_quantizers["weight"].num_bits
        for name, module in made.named_modules()
        if "weight" in getattr(module, "weights_quantizers", {})
    }
    return {layer: next(x.name for x in schemes if x.bits == width) for layer, width in bits.items()}


if __name__ == "__main__":
    main()
