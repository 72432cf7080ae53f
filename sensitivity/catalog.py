"""The metrics and tasks that Bitplan offers. Front: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from quant.kv_cache import is_cache
from quant.schemes import parse_scheme

Unit = Literal["choice", "block", "roles"]
Need = Literal["labels", "logits", "double_backward", "images", "experts", "user_metric"]


@dataclass(frozen=True)
class Workload:
    """How much is asked for: layers, (layer, scheme) choices, samples, and at most `probes` per layer.

    `share` of a forward pass is what a choice costs on average: the model from the block that changes on.
    `streamed` gradients run the forward pass of every block twice.
    """

    layers: int
    choices: int
    samples: int
    probes: int
    batch_size: int
    share: float = 1.0
    streamed: bool = False


@dataclass(frozen=True)
class Metric:
    """How one metric is measured and read.

    module     "package.module:Class"; importing it does not load torch
    unit       "choice": one (layer, scheme) at a time; "block": samples or probes, many choices at once;
               "roles": made of other metrics' scores, one metric for each layer
    needs      what task and data must offer: labels (a loss against the truth), logits, double_backward,
               images, experts (a model that routes its tokens), user_metric (a function of the user's own)
    direction  which values are better
    additive   the sum over layers estimates the divergence of a whole plan
    cost       model passes, in words
    forwards   the same as a number: forward passes of one sample, at most (a backward counts 2)
    version    grows when the metric returns other numbers than before
    sees_activations  whether rounding a layer's inputs changes it; if not, schemes that do are refused
    by_context  whether it can be measured on the samples of one context (sensitivity/contexts.py)
    sees_caches  whether rounding an attention layer's keys and values changes it; if not, they are refused
    """

    name: str
    module: str
    unit: Unit
    needs: frozenset[Need]
    direction: Literal["min", "max"]
    additive: bool
    cost: str
    source: str
    summary: str
    forwards: Callable[[Workload], float]
    version: int = 1
    sees_activations: bool = False
    by_context: bool = False
    sees_caches: bool = False

    def load(self) -> Any:
        """A new scorer of its unit's kind (sensitivity/scorers/protocol.py)."""
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
    unit: Unit,
    needs: set[Need],
    *,
    module: str | None = None,
    **rest: Any,
) -> Metric:
    path = f"sensitivity.scorers.{module or name}:{class_name}"
    return Metric(name, path, unit, frozenset(needs), **rest)


def _pass_per_choice(work: Workload) -> float:
    """One at full precision, one per choice, and a whole micro-batch per layer to check runs from blocks."""
    checks = work.layers * min(work.batch_size, work.samples)
    return work.samples * (1 + work.choices * work.share) + checks


def _no_pass(work: Workload) -> int:
    return 0


def _backward_per_sample(work: Workload) -> int:
    return (4 if work.streamed else 3) * work.samples


def _product_per_probe(work: Workload) -> int:
    """Forward, backward and a backward through the backward, on one micro-batch."""
    return 7 * work.layers * work.probes * min(work.batch_size, work.samples)


def _product_per_sample(work: Workload) -> int:
    """Forward and backward on one sample, and a backward through the backward for each layer."""
    return (3 + 4 * work.layers) * work.samples


def _half_steps_per_sample(work: Workload) -> int:
    """Four passes of one forward and one backward; more where factors take more than 256 MiB."""
    return 4 * 3 * work.samples


def _draws_per_sample(work: Workload) -> int:
    """Rounds of one forward and four backward passes per sample, eight at most."""
    return (10 if work.streamed else 9) * 8 * work.samples


def _pass_per_pair(work: Workload) -> float:
    pairs = round(work.choices**2 * (1 - 1 / max(1, work.layers)) / 2)
    return _pass_per_choice(replace(work, choices=work.choices + pairs))


def _noise_per_layer(work: Workload) -> float:
    return _pass_per_choice(replace(work, choices=4 * work.layers))


def _power_per_layer(work: Workload) -> int:
    return 7 * 20 * work.layers * work.samples


DECOUPLED, USER_METRIC = "metric_decoupled", "user_metric"

SCORERS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric(
            "output_kl", "OutputKl", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme",
            source="ZeroQ, Cai et al. 2020",
            summary="Divergence of the outputs from the full-precision ones with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            "output_mse", "OutputMse", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="squared error of the outputs",
            summary="Mean squared change of the model's outputs with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            "sqnr", "Sqnr", "choice", set(), direction="max", additive=False,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="MixDQ, Zhao et al. 2024",
            summary="Signal to quantization noise at the model's output in decibels.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            "ssim", "Ssim", "choice", {"images"}, direction="max", additive=False,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="MixDQ, Zhao et al. 2024; structural similarity, Wang et al. 2004",
            summary="Structural similarity of the images to the full-precision ones.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
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
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True,
        ),
        _metric(
            "pairwise", "Pairwise", "block", set(), direction="min", additive=True,
            cost="one pass over the scoring part per choice and per pair of choices of different layers",
            source="CLADO, Deng et al. 2023",
            summary="As output_kl, and measured for every pair: a quadratic model of any plan's divergence.",
            forwards=_pass_per_pair, sees_activations=True,
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
            "kronecker", "Kronecker", "block", set(), direction="min", additive=True,
            cost="four backward passes per sample for all layers and schemes",
            source="YAQA, Tseng et al. 2025",
            summary="Weight error in a Kronecker model of the divergence's Hessian, by power iteration.",
            forwards=_half_steps_per_sample,
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
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            "metric_delta", "MetricDelta", "choice", {"labels"}, direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="Qualcomm AIMET, automatic mixed precision",
            summary="Loss of the task's own quality (accuracy, perplexity) with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            USER_METRIC, "UserMetricDelta", "choice", {"user_metric"}, direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="the user's own function, embedded use only",
            summary="Rise of the user's own measure of the outputs with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True, sees_caches=True, by_context=True,
        ),
        _metric(
            "size_normalized", "SizeNormalized", "choice", set(), direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme, shared with output_kl",
            source="BitsFusion, Sui et al. 2024",
            summary="output_kl times the layer's number of weights to the power -0.3.",
            forwards=_pass_per_choice, sees_activations=True, by_context=True,
        ),
        _metric(
            "router_kl", "RouterKl", "choice", {"experts"}, direction="min", additive=True,
            cost="one pass over the scoring part per layer and scheme",
            source="MoEQuant, Hu et al. 2025; EAQuant, Fu et al. 2025",
            summary="Divergence of the routers' choice of experts with this one layer quantized.",
            forwards=_pass_per_choice, sees_activations=True, version=2,
        ),
        _metric(
            "linearity", "Linearity", "block", set(), direction="min", additive=True,
            cost="four passes over the scoring part per layer, none per scheme",
            source="HIGGS, Malinovskii et al. 2024",
            summary="Divergence per relative squared weight error, fitted with Gaussian noise.",
            forwards=_noise_per_layer,
        ),
        _metric(
            DECOUPLED, "MetricDecoupled", "roles", set(), direction="min", additive=True,
            cost="that of the metrics of the roles, each on its own layers",
            source="MixDQ, Zhao et al. 2024; ViDiT-Q, Zhao et al. 2024",
            summary="Each layer by the metric of its role, as a part of what that metric can lose.",
            forwards=_pass_per_choice, sees_activations=True, by_context=True,
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
            source="HAWQ-V2, Dong et al. 2020; Hutchinson 1990; XTrace, Epperly et al. 2024",
            summary="Average Hessian trace of the layer times the squared weight error.",
            forwards=_product_per_probe, version=3,
        ),
        _metric(
            "activation_hessian_trace", "ActivationHessianTrace", "block", {"labels", "double_backward"},
            direction="min", additive=True,
            cost="one backward pass per sample, a Hessian product for each layer, the layer alone per scheme",
            source="HAWQ-V2, Dong et al. 2020; Hutchinson 1990",
            summary="Average Hessian trace in the layer's output times the squared change of that output.",
            forwards=_product_per_sample, sees_activations=True, version=2,
        ),
    )
}  # fmt: skip

AUTO = "auto"
"""Stands for the metrics that a search picks itself."""

INTERACTIONS = ("pairwise", "gram_output", "gram_fisher")
"""Metrics whose arrays model pairs of choices."""


def with_interactions(metrics: Sequence[str]) -> list[str]:
    """The metrics, and gram_output where they hold none of INTERACTIONS: it costs nothing beyond output_kl.

    >>> with_interactions(["output_kl"]), with_interactions(["gram_fisher"])
    (['output_kl', 'gram_output'], ['gram_fisher'])
    """
    return [*metrics, *(() if set(metrics) & set(INTERACTIONS) else ("gram_output",))]


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
            "diffusion", "sensitivity.tasks.diffusion:Diffusion", "relative_squared_error", ("ssim", "sqnr"),
            frozenset({"labels", "double_backward", "images"}),
            "Noise prediction of a diffusion model; losses need the true noise as labels.",
        ),
        TaskEntry(
            "generic", "sensitivity.tasks.generic:Generic", "relative_squared_error", (),
            frozenset({"double_backward"}),
            "Any model: its outputs compared with the full-precision model's.",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DataFree:
    """A way to make calibration data from a model alone, `batch` samples in one unit of work; a higher
    `version` where it makes others than before.
    """

    name: str
    module: str
    makes: Literal["tokens", "images"]
    batch: int
    source: str
    summary: str
    version: int = 1

    def load(self) -> Any:
        """A new maker (sensitivity/data_free/protocol.py); loads torch."""
        return _load(self.module)


DATA_FREE: dict[str, DataFree] = {
    entry.name: entry
    for entry in (
        DataFree(
            "random_tokens", "sensitivity.data_free.random_tokens:RandomTokens", "tokens", 64,
            "HIGGS, Malinovskii et al. 2024",
            "Token ids drawn evenly from the vocabulary.",
        ),
        DataFree(
            "generated_tokens", "sensitivity.data_free.generated_tokens:GeneratedTokens", "tokens", 16,
            "LLM-QAT, Liu et al. 2023",
            "Text that the model writes itself from a random first token.",
        ),
        DataFree(
            "batch_norm_images", "sensitivity.data_free.batch_norm_images:BatchNormImages", "images", 32,
            "ZeroQ, Cai et al. 2020",
            "Images that give a model's batch norms the statistics they remember.",
        ),
    )
}  # fmt: skip


def offered_metrics(
    task: str, *, has_labels: bool, has_experts: bool = True, has_user_metric: bool = False
) -> tuple[str, ...]:
    """The metrics whose needs this task, its data and its model meet, in catalog order.

    >>> "hessian_trace" in offered_metrics("image_classification", has_labels=False)
    False
    >>> "hessian_trace" in offered_metrics("causal_lm", has_labels=False)  # tokens are labels
    True
    """
    offers = set(TASKS[task].offers)
    if task != "causal_lm" and not has_labels:
        offers.discard("labels")
    if has_experts:
        offers.add("experts")
    if has_user_metric:
        offers.add("user_metric")
    return tuple(name for name, metric in SCORERS.items() if metric.needs <= offers)


def unseen(metric: str, schemes: Iterable[str]) -> str | None:
    """Why a metric of weights alone is refused for schemes that round more than weights, or None.

    >>> unseen("output_kl", ["w8-aint8", "kv-int8"]) is None
    True
    """
    for scheme in schemes:
        alone, what = ("layers", "keys and values") if is_cache(scheme) else ("weights", "activations")
        seeing = [name for name, entry in SCORERS.items() if _sees(entry, scheme)]
        if metric not in seeing:
            return (
                f"A metric must see what its schemes round. Got {metric!r}, which looks at {alone} alone, for"
                f" {scheme!r}, which rounds {what} too. Use {', '.join(seeing)}, or drop the scheme."
            )
    return None


def _sees(metric: Metric, scheme: str) -> bool:
    if is_cache(scheme):
        return metric.sees_caches
    return metric.sees_activations or parse_scheme(scheme).activation is None
