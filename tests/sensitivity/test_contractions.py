"""Products of gradients with errors: every scheme at once, each as it would be alone, each dW made once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sensitivity import contractions as contractions_module
from sensitivity import weights as weights_module
from sensitivity.contractions import inner, squared_error
from sensitivity.session import Session
from sensitivity.units import BlockUnit
from sensitivity.weights import LayerWeights

MENU = tuple(f"w{bits}{kind}" for bits in (2, 3, 4, 5, 6, 8) for kind in ("", "-asym"))


@pytest.fixture(scope="module")
def session(tiny: Any) -> Session:
    return Session(tiny("llama").spec())


def test_at_once_is_what_each_scheme_gives_alone(session: Session) -> None:
    layer = session.inventory.layers[3].name
    gradient = torch.randn(session.weights.parameter(layer).shape, generator=torch.Generator().manual_seed(0))
    together = inner(session.weights, layer, MENU, gradient)
    expected = [float((gradient.double().reshape(-1) * session.weights.error(layer, s)).sum()) for s in MENU]
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-6)
    for start, stop in ((0, 1), (2, 7), (5, 12)):
        assert inner(session.weights, layer, MENU[start:stop], gradient) == together[start:stop]
    assert inner(session.weights, layer, MENU[::-1], gradient) == together[::-1]


def test_without_room_errors_are_taken_piece_by_piece(session: Session) -> None:
    layer = session.inventory.layers[3].name
    gradient = torch.randn_like(session.weights.parameter(layer))
    small = LayerWeights(session.model, session.inventory, session.inputs, cache_bytes=100)
    assert small.errors(layer, MENU) is None
    found = inner(small, layer, MENU, gradient)
    np.testing.assert_allclose(found, inner(session.weights, layer, MENU, gradient), rtol=1e-4, atol=1e-6)


def test_errors_of_all_layers_stay_within_the_bound(session: Session) -> None:
    layers = [layer.name for layer in session.inventory.layers]
    one = session.weights.parameter(layers[0]).numel() * 4 * 4
    few = LayerWeights(session.model, session.inventory, session.inputs, cache_bytes=2 * 3 * one)
    kept = [few.errors(layer, ("w4",)) is not None for layer in layers]
    assert any(kept)
    assert not all(kept)
    assert sum(stack.nbytes for _, stack in few._errors.values()) <= 3 * one


def test_each_weight_is_quantized_once_however_many_samples(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, made = Session(tiny("llama").spec()), list[tuple[str, str]]()
    own = weights_module.quantized_weight

    def counted(weight: Any, layer: Any, scheme: Any, inputs: Any) -> Any:
        made.append((layer.name, scheme.name))
        return own(weight, layer, scheme, inputs)

    monkeypatch.setattr(weights_module, "quantized_weight", counted)
    layers = tuple(layer.name for layer in fresh.inventory.layers)
    for start, stop in ((0, 4), (4, 6)):
        fresh.run(BlockUnit("fisher", f"samples:{start}:{stop}", ("w2", "w4"), layers))
    assert sorted(made) == sorted((layer, scheme) for layer in layers for scheme in ("w2", "w4"))


def test_squared_errors_are_summed_piece_by_piece(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length that a piece has, the last one shorter."""
    layer = session.inventory.layers[3].name
    expected = float(session.weights.error(layer, "w3").double().square().sum())
    for piece in (2**20, 100, 7):
        monkeypatch.setattr(contractions_module, "PIECE", piece)
        assert squared_error(session.weights, layer, "w3") == pytest.approx(expected, rel=1e-12)
