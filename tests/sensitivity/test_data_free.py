"""Calibration data made from a model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from sensitivity.calibration import vocabulary_size
from sensitivity.data_free import batch_norm_images
from sensitivity.data_free.batch_norm_images import statistics_loss
from sensitivity.data_free.session import MakingSession
from sensitivity.errors import BadCalibration, BadUnit, SessionError
from sensitivity.model_loading import load_model
from sensitivity.spec import NO_DATA
from sensitivity.units import InspectUnit, MakeUnit, unit_from_json

Tiny = Callable[[str], Any]
IMAGES = MakeUnit("batch_norm_images", 0, 16, shape=(1, 8, 8))


@pytest.fixture
def session(tiny: Tiny) -> Callable[[str], MakingSession]:
    return lambda name: MakingSession(replace(tiny(name).spec(), calibration=NO_DATA))


@pytest.fixture
def model(tiny: Tiny) -> Callable[[str], Any]:
    return lambda name: load_model(tiny(name).spec().model, "auto", torch.device("cpu")).model


@pytest.mark.parametrize("method", ["random_tokens", "generated_tokens"])
def test_tokens_are_known_and_repeatable(method: str, session: Any, model: Any) -> None:
    unit = MakeUnit(method, 0, 4, 12, seed=3)
    first, again = (session("llama").run(unit).arrays["input_ids"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first.shape, first.dtype) == ((4, 12), np.int64)
    assert first.min() >= 0
    assert first.max() < vocabulary_size(model("llama"))
    assert len({tuple(row) for row in first}) == 4
    other = session("llama").run(replace(unit, seed=4)).arrays["input_ids"]
    assert not np.array_equal(first, other)


def test_random_tokens_do_not_depend_on_the_cut(session: Any) -> None:
    run = session("llama").run
    whole = run(MakeUnit("random_tokens", 0, 4, 12)).arrays["input_ids"]
    parts = [run(MakeUnit("random_tokens", a, a + 2, 12)).arrays["input_ids"] for a in (0, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_generated_tokens_follow_the_models_own_distribution(session: Any) -> None:
    """Known logits, whatever the hidden states are: tokens come as softmax says, not as the temperature and
    the cut of the model's own settings would have them.
    """
    making = session("llama")
    vocabulary = vocabulary_size(making._model)
    logits = torch.linspace(-2.0, 2.0, vocabulary)
    making._model.lm_head.register_forward_hook(lambda _m, given, _o: logits.expand(*given[0].shape[:-1], -1))
    making._model.generation_config.update(temperature=0.5, top_k=2, do_sample=True)
    written = making.run(MakeUnit("generated_tokens", 0, 128, 16)).arrays["input_ids"][:, 1:]
    counts = np.bincount(written.ravel(), minlength=vocabulary)
    expected = written.size * logits.softmax(-1).numpy()
    assert expected.min() > 2
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, vocabulary - 1)


def test_images_meet_the_statistics_of_the_batch_norms(session: Any, model: Any) -> None:
    """Each batch norm's input has its running mean and deviation, far better than noise has."""
    network = model("resnet")
    torch.manual_seed(0)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)

    def distance(images: torch.Tensor) -> float:
        found: list[float] = []
        handles = [
            norm.register_forward_pre_hook(
                lambda module, inputs: found.append(
                    float(
                        statistics_loss(
                            inputs[0], module.running_mean, (module.running_var + module.eps).sqrt()
                        )
                    )
                )
            )
            for norm in norms
        ]
        with torch.no_grad():
            network(images)
        for handle in handles:
            handle.remove()
        return sum(found)

    making = session("resnet")
    making._model = network
    made = torch.from_numpy(making.run(IMAGES).arrays["pixel_values"])
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    assert distance(made) < 0.5 * distance(noise)
    assert abs(float(made.mean())) < abs(float(noise.mean())) + 0.2


def test_half_precision_models_get_the_images_of_their_weights_in_float32(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm_images, "STEPS", 20)
    half, full = session("resnet"), session("resnet")
    half._model.half()
    full._model.load_state_dict(half._model.state_dict())
    made, expected = (making.run(IMAGES).arrays["pixel_values"] for making in (half, full))
    assert np.isfinite(made).all()
    np.testing.assert_array_equal(made, expected)
    assert next(half._model.parameters()).dtype == torch.float16


def test_images_that_are_not_finite_are_refused(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm_images, "STEPS", 3)
    making = session("resnet")
    norm = next(module for module in making._model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_mean.fill_(torch.inf)
    with pytest.raises(BadCalibration, match="images must be found.* Got NaN or infinity"):
        making.run(IMAGES)


def test_statistics_loss_is_its_definition() -> None:
    values = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    mean, deviation = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    channels = [values[:, c].numpy().ravel() for c in range(3)]
    expected = sum(
        (x.mean() - float(m)) ** 2 + (x.std() - float(s)) ** 2
        for x, m, s in zip(channels, mean, deviation, strict=True)
    )
    assert float(statistics_loss(values, mean, deviation)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "unit", "words"),
    [
        ("resnet", MakeUnit("random_tokens", 0, 2, 8), "token embeddings. Got none"),
        ("bert", MakeUnit("generated_tokens", 0, 2, 8), "that generates"),
        ("llama", IMAGES, "with batch norms. Got none"),
        ("resnet", replace(IMAGES, shape=()), "shape of the images must be known"),
        ("resnet", replace(IMAGES, shape=(7, 8, 8)), r"must take images of shape \[7, 8, 8\]"),
        ("llama", MakeUnit("random_tokens", 0, 2, 10**6), "positions"),
    ],
)
def test_models_that_cannot_serve_say_what_can(name: str, unit: MakeUnit, words: str, session: Any) -> None:
    with pytest.raises(BadCalibration, match=words):
        session(name).run(unit)


def test_an_unknown_device_is_refused(tiny: Tiny) -> None:
    with pytest.raises(SessionError, match="device must be available. Got 'abacus'.*Use cpu"):
        MakingSession(tiny("mlp").spec(calibration=NO_DATA, device="abacus"))


def test_other_units_and_methods_are_refused(session: Any) -> None:
    with pytest.raises(BadUnit, match="asked to make data"):
        session("llama").run(InspectUnit())
    with pytest.raises(BadUnit, match="method must be one of random_tokens"):
        session("llama").run(MakeUnit("magic", 0, 2, 8))


def test_units_survive_json() -> None:
    assert unit_from_json(IMAGES.as_json()) == IMAGES
