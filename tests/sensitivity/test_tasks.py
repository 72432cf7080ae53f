"""Every task against formulas written out in float64, sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sensitivity.catalog import TASKS
from sensitivity.errors import BadCalibration, BadModel, MetricNotOffered
from sensitivity.tasks import softmax
from sensitivity.tasks.task import Batch, Outputs, first_tensor

GENERATOR = torch.Generator().manual_seed(0)


class Returns(nn.Module):
    """A model whose output is fixed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **inputs: Tensor) -> Any:
        return self.output


def batch(size: int = 3, labels: Tensor | None = None, **inputs: Tensor) -> Batch:
    return Batch(inputs or {"x": torch.zeros(size, 1)}, labels, None, size)


def rows_of(task: str, output: Any, inputs: Batch) -> Outputs:
    return TASKS[task].load().outputs(Returns(output), inputs)


def noisy(values: Tensor, scale: float) -> Tensor:
    return values + scale * torch.randn(values.shape, generator=GENERATOR)


def text_batch(labels: Tensor | None = None) -> Batch:
    """Three samples of 5 tokens; the second has 3 real ones, the third is padded on the left."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    tokens = torch.randint(0, 7, (3, 5), generator=GENERATOR)
    return Batch({"input_ids": tokens, "attention_mask": mask}, labels, None, 3)


def given_and_returned(task: str) -> tuple[Batch, Tensor]:
    """Three samples as a task gets them, and what a model returns for them."""
    if task == "diffusion":
        return batch(sample=torch.zeros(3, 1, 2, 4)), LOGITS[:, :2, :4].reshape(3, 1, 2, 4).contiguous()
    inputs = text_batch() if task == "causal_lm" else batch()
    return inputs, LOGITS if task in ("causal_lm", "sequence_embedding") else LOGITS[:, 0]


def naive_kl(p: Tensor, q: Tensor) -> float:
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


LOGITS = torch.randn(3, 5, 7, generator=GENERATOR) * 2
PREDICTED = {0: [0, 1, 2, 3], 1: [0, 1], 2: [2, 3]}
"""Positions whose next token is real and whose own token is real."""


@pytest.mark.parametrize("scale", [1e-3, 0.3, 50.0])
def test_causal_lm_averages_kl_over_real_tokens(scale: float) -> None:
    inputs, other = text_batch(), noisy(LOGITS, scale)
    reference, outputs = rows_of("causal_lm", LOGITS, inputs), rows_of("causal_lm", other, inputs)
    expected = [np.mean([naive_kl(LOGITS[b, t], other[b, t]) for t in PREDICTED[b]]) for b in PREDICTED]
    np.testing.assert_allclose(TASKS["causal_lm"].load().divergence(reference, outputs), expected, rtol=2e-3)


def test_what_padding_holds_does_not_matter() -> None:
    task, inputs = TASKS["causal_lm"].load(), text_batch()
    hidden = torch.ones(3, 5, dtype=torch.bool)
    for row, positions in PREDICTED.items():
        hidden[row, positions] = False
    garbage = torch.where(hidden[..., None], torch.full_like(LOGITS, 1e30), LOGITS)
    first, second = rows_of("causal_lm", LOGITS, inputs), rows_of("causal_lm", garbage, inputs)
    assert torch.equal(first.rows, second.rows)
    assert task.divergence(first, second).tolist() == [0.0, 0.0, 0.0]


def test_causal_lm_loss_and_perplexity() -> None:
    inputs = text_batch()
    outputs = rows_of("causal_lm", LOGITS, inputs)
    tokens = inputs.inputs["input_ids"]
    logs = LOGITS.double().log_softmax(-1)
    losses = [np.mean([-float(logs[b, t, tokens[b, t + 1]]) for t in PREDICTED[b]]) for b in PREDICTED]
    task = TASKS["causal_lm"].load()
    assert float(task.loss(outputs, inputs)) == pytest.approx(np.mean(losses), rel=1e-6)
    np.testing.assert_allclose(
        task.quality(outputs, inputs, outputs)["perplexity"], np.exp(losses), rtol=1e-6
    )


def test_ignored_labels_have_no_row() -> None:
    labels = torch.full((3, 5), -100)
    labels[:, 1] = 4
    labels[2, 4] = 4
    inputs = text_batch(labels)
    outputs = rows_of("causal_lm", LOGITS, inputs)
    assert outputs.rows_per_sample.tolist() == [1.0, 1.0, 1.0]
    expected = -LOGITS.log_softmax(-1)[[0, 1, 2], [0, 0, 3], 4].mean()
    assert float(TASKS["causal_lm"].load().loss(outputs, inputs)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 50.0])
def test_classification_is_kl_per_sample(scale: float) -> None:
    logits = LOGITS[:, 0]
    other = noisy(logits, scale)
    inputs = batch(labels=torch.tensor([0, 1, 2]))
    task = TASKS["image_classification"].load()
    reference, outputs = (rows_of("image_classification", x, inputs) for x in (logits, other))
    expected = [naive_kl(logits[b], other[b]) for b in range(3)]
    np.testing.assert_allclose(task.divergence(reference, outputs), expected, rtol=2e-3)
    hits = (other.argmax(-1) == torch.tensor([0, 1, 2])).double()
    assert task.quality(outputs, inputs, outputs)["accuracy"].tolist() == hits.tolist()
    loss = nn.functional.cross_entropy(other.double(), torch.tensor([0, 1, 2]))
    assert float(task.loss(outputs, inputs)) == pytest.approx(float(loss), rel=1e-5)
    assert task.quality(outputs, batch(), outputs) == {}


def test_small_divergences_keep_their_digits() -> None:
    logits = LOGITS[:, 0] * 4
    step = 1e-3 * torch.randn(logits.shape, generator=GENERATOR)
    inputs, task = batch(), TASKS["image_classification"].load()
    single = [rows_of("image_classification", x, inputs) for x in (logits, logits + step)]
    exact = [naive_kl(logits[b], (logits + step)[b]) for b in range(3)]
    np.testing.assert_allclose(task.divergence(*single), exact, rtol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_no_change_is_exactly_zero(task: str) -> None:
    inputs, output = given_and_returned(task)
    reference = rows_of(task, output, inputs)
    assert TASKS[task].load().divergence(reference, reference).tolist() == [0.0, 0.0, 0.0]


def test_embeddings_are_means_over_real_tokens() -> None:
    inputs, other = text_batch(), noisy(LOGITS, 0.4)
    reference, outputs = (
        rows_of("sequence_embedding", {"last_hidden_state": x}, inputs) for x in (LOGITS, other)
    )
    mask = inputs.inputs["attention_mask"].bool()
    means = [torch.stack([x[b][mask[b]].double().mean(0) for b in range(3)]) for x in (LOGITS, other)]
    expected = 1 - nn.functional.cosine_similarity(*means)
    np.testing.assert_allclose(
        TASKS["sequence_embedding"].load().divergence(reference, outputs), expected.numpy(), rtol=1e-4
    )


def test_generic_is_relative_squared_error() -> None:
    output = LOGITS[:, :2].contiguous()
    other = noisy(output, 0.2)
    reference, outputs = (rows_of("generic", (x, "aux"), batch()) for x in (output, other))
    errors = (other - output).double().flatten(1).square().sum(-1)
    expected = errors / output.double().flatten(1).square().sum(-1)
    np.testing.assert_allclose(TASKS["generic"].load().divergence(reference, outputs), expected, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_half_the_squared_change_is_the_divergence_to_second_order(task: str) -> None:
    inputs, output = given_and_returned(task)
    loaded = TASKS[task].load()
    reference, outputs = (
        rows_of(task, output.double(), inputs),
        rows_of(task, noisy(output.double(), 1e-4), inputs),
    )
    halves = reference.sums(loaded.change(reference, outputs).square().sum(-1)) / 2
    np.testing.assert_allclose(halves, loaded.divergence(reference, outputs), rtol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_the_sampled_objective_has_the_divergence_as_its_mean_square(task: str) -> None:
    """E[(g . d)^2] / 2 over many draws against the divergence after a small step d of the output."""
    inputs, output = given_and_returned(task)
    output = output.double()[:1]
    one = Batch({name: value[:1] for name, value in inputs.inputs.items()}, None, None, 1)
    loaded, step = (
        TASKS[task].load(),
        1e-3 * torch.randn(output.shape, generator=GENERATOR, dtype=torch.float64),
    )
    moved = output.clone().requires_grad_(True)
    reference = rows_of(task, output, one)
    squares = []
    for draw in range(3000):
        objective = loaded.sampled_objective(rows_of(task, moved, one), np.random.default_rng(draw))
        (gradient,) = torch.autograd.grad(objective, moved)
        squares.append(float((gradient * step).sum()) ** 2 / 2)
    divergence = loaded.divergence(reference, rows_of(task, output + step, one))[0]
    assert np.mean(squares) == pytest.approx(divergence, abs=4 * np.std(squares) / 3000**0.5)
    assert np.std(squares) / 3000**0.5 < divergence / 10


def test_labels_are_drawn_from_the_models_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    outputs = Outputs(logits.requires_grad_(True), np.zeros(1, np.int64), 1)
    counts = np.zeros(3)
    for draw in range(3000):
        objective = softmax.sampled_objective(outputs, np.random.default_rng(draw))
        (gradient,) = torch.autograd.grad(objective, logits)
        counts[int(gradient.argmin())] += 1
    np.testing.assert_allclose(counts / 3000, logits.detach().softmax(-1)[0].numpy(), atol=0.03)


@pytest.mark.parametrize("task", ["sequence_embedding", "generic", "image_classification"])
def test_tasks_without_labels_have_no_loss(task: str) -> None:
    outputs = Outputs(LOGITS[:, 0], np.arange(3), 3)
    with pytest.raises(MetricNotOffered, match="a loss"):
        TASKS[task].load().loss(outputs, batch())


def test_unusable_samples_are_named() -> None:
    causal, classes = TASKS["causal_lm"].load(), TASKS["image_classification"].load()
    embedding = TASKS["sequence_embedding"].load()
    tokens, mask = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5, dtype=torch.int64)
    empty = mask.clone()
    empty[1] = 0
    cases: list[tuple[Any, Batch, str]] = [
        (causal, batch(input_ids=tokens, attention_mask=empty), "Got none in row 1"),
        (causal, batch(input_ids=tokens[0]), r"shape \(samples, tokens\)"),
        (causal, batch(input_ids=tokens.float()), "whole numbers"),
        (causal, batch(input_ids=tokens, attention_mask=mask[:, 1:]), "attention_mask must have the shape"),
        (causal, batch(labels=torch.zeros(3), input_ids=tokens), "labels must have the shape"),
        (causal, batch(first=tokens, second=tokens), "must be named input_ids"),
        (classes, batch(labels=torch.zeros(3)), "labels must be class numbers"),
        (classes, batch(labels=torch.tensor([0, 7, 1])), "from 0 to 6. Got 7 in row 1"),
        (classes, batch(labels=torch.tensor([0, 1, -1])), "from 0 to 6. Got -1 in row 2"),
        (embedding, batch(input_ids=tokens, attention_mask=empty), "Got none in row 1"),
    ]
    for task, inputs, words in cases:
        with pytest.raises(BadCalibration, match=words):
            task.check(inputs, 7)


@pytest.mark.parametrize(
    ("task", "output", "words"),
    [
        ("generic", torch.zeros(4, 2), "one row per sample"),
        ("generic", torch.tensor(0.0), "one row per sample"),
        ("generic", "text", "must return a tensor of floats. Got str"),
        ("image_classification", torch.zeros(3, 2, 2), "one row per sample"),
        ("causal_lm", torch.zeros(3, 5), r"\(samples, tokens, vocabulary\)"),
    ],
)
def test_unusable_outputs_are_refused(task: str, output: Any, words: str) -> None:
    inputs = text_batch() if task == "causal_lm" else batch()
    with pytest.raises(BadModel, match=words):
        rows_of(task, output, inputs)


def test_the_output_is_found_wherever_it_is() -> None:
    value = torch.ones(2)
    for output in (value, (value, 1), [value], {"y": value}, {"aux": torch.zeros(1), "logits": value}):
        assert torch.equal(first_tensor(output), value)
