"""Making a plan so: quantized-and-dequantized weights in place of a model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from quant.adjusted import Adjusted, dequantized
from quant.formats import codec_of
from quant.inputs import LayerInputs
from quant.layers import Inventory, Layer, parameter_name
from quant.ops import from_matrix, to_matrix
from quant.packing import Encoded
from quant.plan import Plan
from quant.planning import scheme_of
from quant.rounded_inputs import rounded_inputs, rounding_of
from quant.schemes import Scheme

Assignment = Plan | Mapping[str, str | Scheme]
InputsOf = Callable[[str], LayerInputs]
"""Layer name -> statistics of its inputs; asked only for schemes whose quantizer needs them."""


class ApplyError(ValueError):
    """An assignment that does not fit the model."""


class NonFinite(ApplyError):  # noqa: N818 - says what the weight is
    """A weight that is, or becomes, NaN or infinite; `layer` and `scheme` name where."""

    def __init__(self, layer: str, scheme: str, what: str) -> None:
        super().__init__(
            f"Weights must be finite. Got NaN or infinity {what} of layer {layer!r} with scheme {scheme!r}."
            " Repair the checkpoint, or exclude the layer."
        )
        self.layer, self.scheme = layer, scheme


def quantize_dequantize(
    weight: Tensor, op: str, name: str, scheme: Scheme, inputs: InputsOf | None = None
) -> Tensor:
    """A weight as it comes back from storage: same shape, dtype and device, memory of its own.

    `op` is a key of OPS, `name` the layer's for messages and for `inputs`. Raises NonFinite, and ApplyError
    when the quantizer needs statistics and there are none.
    """
    return decode_weight(encode_weight(weight, op, name, scheme, inputs), weight, op, name, scheme)


def decode_weight(stored: Encoded | Adjusted, weight: Tensor, op: str, name: str, scheme: Scheme) -> Tensor:
    """The weight that a stored one stands for, in the shape, dtype and on the device of `weight`.

    Raises NonFinite where its dtype does not hold the values.
    """
    matrix = dequantized(stored).to(weight)
    if not torch.isfinite(matrix).all():
        raise NonFinite(name, scheme.name, f"in {weight.dtype} after quantizing the weight")
    return from_matrix(matrix, op, tuple(weight.shape)).contiguous()


def encode_weight(
    weight: Tensor, op: str, name: str, scheme: Scheme, inputs: InputsOf | None = None
) -> Encoded | Adjusted:
    """What is stored of a weight: values for the format's codec to pack, and what a quantizer adds to them.

    `quantize_dequantize` decodes the same. Raises NonFinite for a weight that is not finite, and ApplyError
    when the quantizer needs statistics and there are none.
    """
    if not torch.isfinite(weight).all():
        raise NonFinite(name, scheme.name, "in the weight")
    known = inputs_for(name, scheme, inputs)
    matrix = to_matrix(weight.detach(), op)
    if known is not None:
        matrix = matrix.to(known.second_moments.device)
    return scheme.load()(matrix, codec_of(scheme.weight).own_format(scheme.weight), known)


def inputs_for(name: str, scheme: Scheme, inputs: InputsOf | None) -> LayerInputs | None:
    """The statistics that a scheme needs, or None. Raises ApplyError when they are missing."""
    if not scheme.needs_inputs:
        return None
    if inputs is None:
        raise ApplyError(
            f"Scheme {scheme.name} of layer {name!r} must be given statistics of the layer's inputs."
            " Got none. Pass the calibration data that the plan was made with."
        )
    return inputs(name)


def quantized_weight(
    weight: Tensor, layer: Layer, scheme: str | Scheme, inputs: InputsOf | None = None
) -> Tensor:
    """What `scheme` makes of a layer's weight: same shape, dtype and device.

    Raises ApplyError when the shape is not the layer's, the scheme refuses it or needs inputs that are
    not given, NonFinite naming layer and scheme when a weight is, or becomes, NaN or infinite.
    """
    chosen = scheme_of(scheme)
    if tuple(weight.shape) != layer.weight_shape:
        raise ApplyError(
            f"Weight of layer {layer.name!r} must have the shape {layer.weight_shape} of the inventory."
            f" Got {tuple(weight.shape)}. Take the inventory of this model."
        )
    refusal = chosen.refuses(layer)
    if refusal:
        raise ApplyError(
            f"Scheme must be offered for its layer. Got {chosen.name} for {layer.name}: {refusal}."
        )
    return quantize_dequantize(weight, layer.op, layer.name, chosen, inputs)


@contextmanager
def fake_quantized(
    model: nn.Module, plan: Assignment, inventory: Inventory, inputs: InputsOf | None = None
) -> Iterator[nn.Module]:
    """The model with a plan's weights and activations while the block runs; bit for bit the old one after.

    `plan` is a Plan or {layer: scheme}; layers it does not name keep their precision. Only the originals of
    changed layers are held, and they return to the same memory, also when the block raises. Blocks nest.
    `inputs` are asked for before the first weight changes; for static activations they must be `Ranges` too,
    as those of a session are.

        with fake_quantized(model, {"fc": "w4"}, inventory):
            loss = model(inputs)

    Raises ApplyError for a name that is no layer, NonFinite as `quantized_weight` does, InputsError where a
    layer's inputs cannot be rounded, or a static activation is given no ranges.
    """
    chosen = _resolve(plan, inventory)
    known = _known(chosen, inputs)
    found = [rounding_of(layer, scheme, inputs, parameter_of(model, layer)) for layer, scheme in chosen]
    with ExitStack() as stack:
        stack.enter_context(rounded_inputs(model, [rounding for rounding in found if rounding is not None]))
        for layer, scheme in chosen:
            parameter = parameter_of(model, layer)
            replacement = quantized_weight(parameter, layer, scheme, known)
            stack.enter_context(_swapped(parameter, replacement))
        yield model


@contextmanager
def replaced_weights(
    model: nn.Module, weights: Mapping[str, Tensor], inventory: Inventory
) -> Iterator[nn.Module]:
    """The model with the given weights while the block runs: `fake_quantized` for weights at hand.

    `weights` are {layer: tensor of the weight's shape}. Raises ApplyError for a name that is no layer.
    """
    layers = [(_layer(name, inventory), weight) for name, weight in weights.items()]
    with ExitStack() as stack:
        for layer, weight in layers:
            stack.enter_context(_swapped(parameter_of(model, layer), weight))
        yield model


def quantize_(
    model: nn.Module, plan: Assignment, inventory: Inventory, inputs: InputsOf | None = None
) -> nn.Module:
    """Replace the weights for good, in their own memory, and return the model. Activations stay as they are.

    Raises like `fake_quantized`; names, shapes and finiteness are checked before any weight changes, and
    `inputs` are asked for while all weights are still the model's own.
    """
    chosen = _resolve(plan, inventory)
    known = _known(chosen, inputs)
    for layer, scheme in chosen:
        if not torch.isfinite(parameter_of(model, layer)).all():
            raise NonFinite(layer.name, scheme.name, "in the weight")
    for layer, scheme in chosen:
        parameter = parameter_of(model, layer)
        with torch.no_grad():
            parameter.copy_(quantized_weight(parameter, layer, scheme, known))
    return model


def parameter_of(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's weight in a model. Raises ApplyError where the model has no such weight."""
    try:
        weight: Tensor | None = model.get_parameter(parameter_name(layer.name, layer.op))
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.weight_shape:
        got = "none" if weight is None else f"shape {tuple(getattr(weight, 'shape', ()))}"
        raise ApplyError(
            f"Model must have a weight of shape {layer.weight_shape} at {layer.name!r}. Got {got}."
            " Take the inventory of this model."
        )
    return weight


@contextmanager
def _swapped(parameter: Tensor, replacement: Tensor) -> Iterator[None]:
    """Put other values into the same memory while the block runs."""
    original = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(replacement)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(original)


def _known(chosen: list[tuple[Layer, Scheme]], inputs: InputsOf | None) -> InputsOf:
    """The statistics of all layers that need some, taken now."""
    found = {layer.name: inputs_for(layer.name, scheme, inputs) for layer, scheme in chosen}
    return {name: known for name, known in found.items() if known is not None}.__getitem__


def _resolve(plan: Assignment, inventory: Inventory) -> list[tuple[Layer, Scheme]]:
    """Layers with schemes, each tensor once."""
    assignment = plan.weights if isinstance(plan, Plan) else plan
    chosen: dict[str, tuple[Layer, Scheme]] = {}
    for name, value in assignment.items():
        layer, scheme = _layer(name, inventory), scheme_of(value)
        other = chosen.setdefault(layer.name, (layer, scheme))[1]
        if other != scheme:
            raise ApplyError(
                f"Modules that share a tensor must get one scheme. Got {other.name} and {scheme.name} for"
                f" {', '.join(layer.names)}. Name one of them."
            )
    return list(chosen.values())


def _layer(name: str, inventory: Inventory) -> Layer:
    layer = inventory.by_name.get(name)
    if layer is None:
        known = list(inventory.by_name)
        close = get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise ApplyError(
            f"Assignment must name layers of the inventory. Got {name!r}. Names are like {', '.join(close)}."
        )
    return layer
