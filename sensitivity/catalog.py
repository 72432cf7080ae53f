"""The metrics and tasks that Bitplan offers. Front: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Need = Literal["labels", "logits", "double_backward"]


@dataclass(frozen=True)
class Workload:
    """How much is asked for: layers, (layer, scheme) choices, samples, and at most `probes` per layer."""

    layers: int
    choices: int
    samples: int
    probes: int
    batch_size: int


@dataclass(frozen=True)
class Metric:
    """How one metric is measured and read.

    module     "package.module:Class"; importing it does not load torch
    unit       "choice": one (layer, scheme) at a time; "block": samples or probes, many choices at once
    needs      what task and data must offer: labels (a loss against the truth), logits, double_backward
    direction  which values are better
    additive   the sum over layers estimates the divergence of a whole plan
    cost       model passes, in words
    forwards   the same as a number: forward passes of one sample, at most (a backward counts 2)
    version    grows when the metric returns other numbers than before
    sees_activations  whether rounding a layer's inputs changes it; if not, schemes that do are refused
    """

    name: str
    module: str
    unit: Literal["choice", "block"]
    needs: frozenset[Need]
    direction: Literal["min", "max"]
    additive: bool
    cost: str
    source: str
    summary: str
    forwards: Callable[[Workload], int]
    version: int = 1
    sees_activations: bool = False

    def load(self) -> Any:
        """A new scorer: a `ChoiceScorer` or a `BlockScorer` (sensitivity/scorers/protocol.py)."""
        return _load(self.module)


@dataclass(frozen=True)
class TaskEntry:
    """What a model is for. `offers` are the needs it meets; labels count only if the data hold them."""

    name: str
    module: str
    divergence: str
    quality: tuple[str, ...]
    offers: frozenset[Need]
    summary: str

    def load(self) -> Any:
        """A new task object (sensitivity/tasks/task.py); loads torch."""
        return _load(self.module)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)()


def _metric(
    name: str,
    class_name: str,
    unit: Literal["choice", "block"],
    needs: set[Need],
    *,
    module: str | None = None,
    **rest: Any,
) -> Metric:
    path = f"sensitivity.scorers.{module or name}:{class_name}"
    return Metric(name, path, unit, frozenset(needs), **rest)


def _pass_per_choice(work: Workload) -> int:
    return work.choices * work.samples


def _no_pass(work: Workload) -> int:
    return 0


def _backward_per_sample(work: Workload) -> int:
    return 3 * work.samples


def _product_per_probe(work: Workload) -> int:
    """Forward, backward and a backward through the backward, on one micro-batch."""
    return 7 * work.layers * work.probes * min(work.batch_size, work.samples)


def _draws_per_sample(work: Workload) -> int:
    """Rounds of one forward and four backward passes per sample, eight at most."""
    return 9 * 8 * work.samples


def _noise_per_layer(work: Workload) -> int:
    return 4 * work.layers * work.samples


def _power_per_layer(work: Workload) -> int:
    return 7 * 20 * work.layers * work.samples


SCORERS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric(
            "output_kl", "OutputKl", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme",
            source="ZeroQ, Cai et al. 2020",
            summary="Divergence of the outputs from the full-precision ones with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "output_mse", "OutputMse", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="squared error of the outputs",
            summary="Mean squared change of the model's outputs with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "sqnr", "Sqnr", "choice", set(), direction="max", additive=False,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="MixDQ, Zhao et al. 2024",
            summary="Signal to quantization noise at the model's output in decibels.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "weight_error", "WeightError", "choice", set(), direction="min", additive=True,
            cost="no model pass",
            source="squared error of the weights",
            summary="Squared error of the quantized weights, without data.",
            forwards=_no_pass,
        ),
        _metric(
            "gram_output", "GramOutput", "choice", set(), direction="min", additive=True,
            cost="none beyond output_kl; keeps a sketch of 256 KiB per layer and scheme",
            source="Bitplan, docs/metrics.md",
            summary="Change of the outputs in their own metric; inner products model any plan's divergence.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "fisher", "Fisher", "block", set(), direction="min", additive=True,
            cost="one backward pass per sample for all layers and schemes",
            source="natural gradient, Amari 1998; labels sampled from the model",
            summary="Half the mean squared directional derivative along the weight error, labels sampled.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "gram_fisher", "GramFisher", "block", set(), direction="min", additive=True,
            cost="4 to 32 backward passes per sample for all layers and schemes",
            source="Bitplan, docs/metrics.md",
            summary="As fisher with more draws; products of samples model any plan's divergence.",
            forwards=_draws_per_sample,
        ),
        _metric(
            "fisher_diagonal", "FisherDiagonal", "block", set(), direction="min", additive=True,
            module="fisher",
            cost="one backward pass per sample for all layers and schemes",
            source="FIT, Zandonati et al. 2022",
            summary="Half the mean of sum g^2 dW^2, labels sampled: the diagonal of the information.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "fisher_empirical", "FisherEmpirical", "block", {"labels"}, direction="min", additive=True,
            module="fisher",
            cost="one backward pass per sample for all layers and schemes",
            source="empirical Fisher, Kunstner et al. 2019",
            summary="As fisher with the labels of the data.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "fisher_empirical_diagonal", "FisherEmpiricalDiagonal", "block", {"labels"}, direction="min",
            additive=True, module="fisher",
            cost="one backward pass per sample for all layers and schemes",
            source="SqueezeLLM, Kim et al. 2023",
            summary="As fisher_diagonal with the labels of the data.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "taylor", "Taylor", "block", {"labels"}, direction="min", additive=True,
            cost="one backward pass per sample for all layers and schemes",
            source="AutoRound's delta loss; MixLLM, Zheng et al. 2024",
            summary="Mean over samples of |g . dW + (g . dW)^2 / 2|.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "taylor_first", "TaylorFirst", "block", {"labels"}, direction="min", additive=True,
            module="taylor",
            cost="one backward pass per sample for all layers and schemes",
            source="AutoRound's delta loss",
            summary="Mean over samples of |g . dW|.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "gradient_output", "GradientOutput", "block", {"labels"}, direction="min", additive=True,
            cost="one backward pass per sample, and the layer alone per scheme",
            source="NVIDIA ModelOpt, auto_quantize with method gradient",
            summary="Squared gradient at the layer's output times the squared change of that output.",
            forwards=_backward_per_sample,
        ),
        _metric(
            "layer_output_error", "LayerOutputError", "choice", set(), direction="min", additive=True,
            cost="no model pass per scheme: second moments of the inputs, once for many layers",
            source="GPTQ, Frantar et al. 2022",
            summary="Mean squared error at the layer's own output.",
            forwards=_no_pass,
        ),
        _metric(
            "loss_delta", "LossDelta", "choice", {"labels"}, direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="AdaQuant, Hubara et al. 2021",
            summary="Rise of the loss against the truth with this one layer quantized, at least 0.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "metric_delta", "MetricDelta", "choice", {"labels"}, direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="Qualcomm AIMET, automatic mixed precision",
            summary="Loss of the task's own quality (accuracy, perplexity) with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "size_normalized", "SizeNormalized", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="BitsFusion, Sui et al. 2024",
            summary="output_kl times the layer's number of weights to the power -0.3.",
            forwards=_pass_per_choice, sees_activations=True,
        ),
        _metric(
            "linearity", "Linearity", "block", set(), direction="min", additive=True,
            cost="four passes over the scoring part per layer, none per scheme",
            source="HIGGS, Malinovskii et al. 2024",
            summary="Divergence per relative squared weight error, fitted with Gaussian noise.",
            forwards=_noise_per_layer,
        ),
        _metric(
            "random", "Random", "choice", set(), direction="min", additive=True,
            cost="no model pass",
            source="a control",
            summary="A random sensitivity per layer times 4^-bits: what every metric must beat.",
            forwards=_no_pass,
        ),
        _metric(
            "hessian_top_eigenvalue", "HessianTopEigenvalue", "block", {"labels", "double_backward"},
            direction="min", additive=True,
            cost="up to 20 Hessian-vector products over the scoring part per layer, none per scheme",
            source="HAWQ, Dong et al. 2019",
            summary="Largest Hessian eigenvalue of the layer times its mean squared weight error.",
            forwards=_power_per_layer,
        ),
        _metric(
            "hessian_trace", "HessianTrace", "block", {"labels", "double_backward"}, direction="min",
            additive=True,
            cost="one Hessian-vector product on one micro-batch per layer and probe, none per scheme",
            source="HAWQ-V2, Dong et al. 2020; Hutchinson 1990",
            summary="Average Hessian trace of the layer times the squared weight error.",
            forwards=_product_per_probe,
        ),
    )
}  # fmt: skip

INTERACTIONS = ("gram_output", "gram_fisher")
"""Metrics whose arrays model pairs of choices."""


def with_interactions(metrics: Sequence[str]) -> list[str]:
    """The metrics, and the first of INTERACTIONS where they hold none.

    >>> with_interactions(["output_kl"]), with_interactions(["gram_fisher"])
    (['output_kl', 'gram_output'], ['gram_fisher'])
    """
    return [*metrics, *(() if set(metrics) & set(INTERACTIONS) else INTERACTIONS[:1])]


TASKS: dict[str, TaskEntry] = {
    task.name: task
    for task in (
        TaskEntry(
            "causal_lm", "sensitivity.tasks.causal_lm:CausalLm", "kl", ("perplexity",),
            frozenset({"labels", "logits", "double_backward"}),
            "Next-token prediction; the tokens are their own labels.",
        ),
        TaskEntry(
            "image_classification", "sensitivity.tasks.image_classification:ImageClassification", "kl",
            ("accuracy",),
            frozenset({"labels", "logits", "double_backward"}),
            "One class per sample; quality and hessian_trace need labels.",
        ),
        TaskEntry(
            "sequence_embedding", "sensitivity.tasks.sequence_embedding:SequenceEmbedding",
            "one_minus_cosine", (),
            frozenset({"double_backward"}),
            "One vector per text: the mean of the last hidden states of its tokens.",
        ),
        TaskEntry(
            "generic", "sensitivity.tasks.generic:Generic", "relative_squared_error", (),
            frozenset({"double_backward"}),
            "Any model: its outputs compared with the full-precision model's.",
        ),
    )
}  # fmt: skip


def offered_metrics(task: str, *, has_labels: bool) -> tuple[str, ...]:
    """The metrics whose needs this task meets, in catalog order.

    >>> "hessian_trace" in offered_metrics("image_classification", has_labels=False)
    False
    >>> "hessian_trace" in offered_metrics("causal_lm", has_labels=False)  # tokens are labels
    True
    """
    offers = set(TASKS[task].offers)
    if task != "causal_lm" and not has_labels:
        offers.discard("labels")
    return tuple(name for name, metric in SCORERS.items() if metric.needs <= offers)


def unseen_activations(metric: str, scheme: str) -> str:
    """Why a metric of weights alone is refused for a scheme that rounds activations too."""
    seeing = ", ".join(name for name, entry in SCORERS.items() if entry.sees_activations)
    return (
        f"A metric must see what its schemes round. Got {metric!r}, which looks at weights alone, for"
        f" {scheme!r}, which rounds activations too. Use {seeing}, or drop the scheme."
    )
