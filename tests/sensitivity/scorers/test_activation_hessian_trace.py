"""Traces in the outputs of layers, against explicit Hessians in float64."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant.codecs.activations import round_input
from quant.inventory import take_inventory
from quant.schemes import parse_scheme
from sensitivity.catalog import SCORERS
from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import rademacher
from sensitivity.scorers.activation_hessian_trace import _form, _shifted, _squared_changes
from sensitivity.session import Session
from sensitivity.units import BlockPlan, BlockUnit
from sensitivity.weights import LayerWeights

NAME = "activation_hessian_trace"
CONVOLUTION = "resnet.encoder.stages.1.layers.0.layer.1.convolution"
SCHEMES = ("w2", "w4", "w8-aint4")


@pytest.fixture(scope="module")
def session(tiny: Any) -> Session:
    found = Session(tiny("resnet").spec(include=("*",)))
    found.model.double()
    return found


def values_of(session: Session, layer: str, schemes: tuple[str, ...] = SCHEMES) -> np.ndarray:
    """(samples, schemes) of one layer."""
    plan = BlockPlan((layer,), schemes, len(session.samples.parts["scoring"]), session.spec)
    units = SCORERS[NAME].load().blocks(plan, {})
    return np.concatenate([session.run(unit).arrays["values"][:, 0] for unit in units])


def output_and_input(session: Session, layer: str, image: Tensor) -> tuple[Tensor, Tensor]:
    kept: list[tuple[Tensor, Tensor]] = []
    module = session.model.get_submodule(layer)
    hook = module.register_forward_hook(lambda _m, given, output: kept.append((output, given[0])))
    with torch.no_grad():
        session.model(pixel_values=image)
    hook.remove()
    return kept[0]


def explicit_hessian(session: Session, layer: str, image: Tensor, label: Tensor) -> Tensor:
    """Of one sample's loss in the layer's output, which a hook replaces."""
    output, _ = output_and_input(session, layer, image)

    def loss(flat: Tensor) -> Tensor:
        hook = session.model.get_submodule(layer).register_forward_hook(
            lambda _m, _i, _o: flat.view_as(output)
        )
        logits = session.model(pixel_values=image).logits
        hook.remove()
        return nn.functional.cross_entropy(logits, label)

    with torch.enable_grad():
        return torch.autograd.functional.hessian(loss, output.flatten())


def samples(session: Session) -> Any:
    labels = session.samples.labels
    assert labels is not None
    for row in session.samples.parts["scoring"]:
        image = session.samples.tensors["pixel_values"][row : row + 1].double()
        yield image, labels[row : row + 1]


def changed_output(session: Session, layer: str, scheme: str, given: Tensor) -> Tensor:
    """The layer alone, from the definition of the scheme."""
    module = session.model.get_submodule(layer)
    assert isinstance(module, nn.Conv2d)
    activation = parse_scheme(scheme).activation
    rounded = given if activation is None else round_input(given, activation, "conv2d", None)
    weight = session.weights.quantized(layer, scheme)
    return nn.functional.conv2d(rounded, weight, None, module.stride, module.padding)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_value_is_the_quadratic_form_of_the_explicit_hessian(session: Session, scheme: str) -> None:
    values = values_of(session, CONVOLUTION, (scheme,))[:, 0]
    for index, (image, label) in enumerate(samples(session)):
        if index >= 2:
            break
        hessian = explicit_hessian(session, CONVOLUTION, image, label)
        output, given = output_and_input(session, CONVOLUTION, image)
        probe = torch.from_numpy(rademacher(output.numel(), (session.spec.seed, NAME, CONVOLUTION, index)))
        change = (changed_output(session, CONVOLUTION, scheme, given) - output).square().sum()
        expected = float(probe @ hessian @ probe) / output.numel() * float(change)
        assert values[index] == pytest.approx(expected, rel=1e-9)


def test_the_mean_over_all_probes_is_the_trace(session: Session) -> None:
    """In the logits Tr H = 1 - sum p^2; five of them have 32 vectors of signs."""
    image, label = next(samples(session))
    module = session.model.get_submodule("classifier.1")
    with torch.enable_grad(), _shifted([module]) as calls:
        logits = session.model(pixel_values=image).logits
        loss = nn.functional.cross_entropy(logits, label)
    (shifts,) = (call.shifts for call in calls)
    gradients = torch.autograd.grad(loss, shifts, create_graph=True)
    forms = [_form(shifts, gradients, np.array(signs)) for signs in product((-1.0, 1.0), repeat=5)]
    probabilities = logits.detach().softmax(-1)
    assert np.mean(forms) == pytest.approx(1 - float(probabilities.square().sum()))
    assert float(explicit_hessian(session, "classifier.1", image, label).trace()) == pytest.approx(
        np.mean(forms)
    )


def test_rounded_inputs_cost_more_than_the_same_weights_alone(session: Session) -> None:
    alone, both = values_of(session, CONVOLUTION, ("w8", "w8-aint4")).T
    assert (np.abs(both) > np.abs(alone)).all()


def test_all_layers_at_once_give_what_each_gives_alone(session: Session) -> None:
    layers = tuple(layer.name for layer in session.inventory.layers)
    together = session.run(BlockUnit(NAME, "samples:0:2", ("w3",), layers)).arrays["values"]
    for position in (0, 3, len(layers) - 1):
        alone = session.run(BlockUnit(NAME, "samples:0:2", ("w3",), (layers[position],))).arrays["values"]
        np.testing.assert_allclose(together[:, position], alone[:, 0], rtol=1e-12)
    assert not any(module._forward_hooks for module in session.model.modules())


def test_a_layer_that_is_called_twice_has_one_hessian_over_both_outputs() -> None:
    """L = (a + b)^2 over the outputs a and b of two calls: z'Hz = 2 (z_a + z_b)^2."""
    module = nn.Linear(2, 1, bias=False)
    with _shifted([module]) as calls:
        loss = sum(module(torch.full((1, 2), value)) for value in (1.0, 2.0)).square().sum()
    (first,), (second,) = (call.shifts for call in calls)
    gradients = torch.autograd.grad(loss, (first, second), create_graph=True)
    for signs, expected in (([1.0, 1.0], 8.0), ([1.0, -1.0], 0.0)):
        assert _form([first, second], gradients, np.array(signs)) == expected


def test_an_infinite_loss_is_named(tiny: Any) -> None:
    session = Session(tiny("resnet").spec())
    session.weights.parameter("resnet.embedder.embedder.convolution").data.fill_(torch.inf)
    with pytest.raises(NonFiniteScore, match=f"{NAME} on sample 0"):
        session.run(BlockUnit(NAME, "samples:0:2", ("w4",), (CONVOLUTION,)))


def test_embeddings_routers_and_experts_have_outputs_too(tiny: Any) -> None:
    session = Session(tiny("mixtral").spec(include=("*",)))
    kinds = {"embed_tokens", "gate", "gate_up_proj", "down_proj", "lm_head"}
    layers = {x.name.rpartition(".")[2]: x.name for x in reversed(session.inventory.layers)}
    chosen = tuple(layers[kind] for kind in sorted(kinds))
    found = session.run(BlockUnit(NAME, "samples:0:1", ("w2",), chosen)).arrays["values"][0, :, 0]
    assert np.isfinite(found).all()
    assert (found != 0).all()


class HeadFirst(nn.Module):
    """A tied table that is a linear layer by its first name."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
        self.table.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_a_tied_table_rounds_the_inputs_of_the_head_alone() -> None:
    """Against lookups in the quantized table, and products of rounded hidden states with it."""
    torch.manual_seed(0)
    model, tokens = HeadFirst().requires_grad_(False), torch.tensor([[3, 17, 0, 9]])
    weights = LayerWeights(model, take_inventory(model, include=["*"]))
    session, unit = SimpleNamespace(model=model, weights=weights), BlockUnit(NAME, "", ("w4", "w4-aint4"), ())
    with _shifted([model.head, model.table]) as calls:
        model(tokens)
    places = [(model.head, "weight"), (model.table, "weight")]
    found = _squared_changes(session, unit, "head", places, calls)  # type: ignore[arg-type]
    weight, quantized, hidden = model.head.weight, weights.quantized("head", "w4"), model.table(tokens)
    activation = parse_scheme("w4-aint4").activation
    assert activation is not None
    looked_up = (quantized[tokens] - weight[tokens]).square().sum()
    for value, given in zip(found, (hidden, round_input(hidden, activation, "linear", None)), strict=True):
        expected = looked_up + (given @ quantized.T - hidden @ weight.T).square().sum()
        assert value == pytest.approx(float(expected), rel=1e-5)
