"""Which metric decides which layer, and what its scores become, against the definition written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quant.layers import Layer
from quant.patterns import PatternError
from sensitivity.scorers.metric_decoupled import CONTENT_ROLES, ROLES, MetricDecoupled
from sensitivity.units import ScoreRow

CONV = Layer("conv_in", "conv2d", (4, 1, 3, 3), (4, 9), 36, None, "convolution", (), "float32")
CROSS = replace(CONV, name="blocks.0.attn2.to_k", role="cross_attention")
SELF = replace(CONV, name="blocks.0.attn1.to_k", role="self_attention", aliases=("blocks.1.attn1.to_k",))
FEED = replace(CONV, name="blocks.0.ff.net.2", role="feed_forward")
LAYERS = (CONV, CROSS, SELF, FEED)
IMAGES = ("output_kl", "ssim", "sqnr")


def test_content_is_judged_by_similarity_the_rest_by_noise() -> None:
    found = MetricDecoupled().decide([replace(CONV, name=role, role=role) for role in ROLES], IMAGES)
    assert found == {role: "ssim" if role in CONTENT_ROLES else "sqnr" for role in ROLES}
    assert MetricDecoupled().decide([CROSS], ("output_kl", "sqnr")) == {CROSS.name: "output_kl"}


@pytest.mark.parametrize(
    ("chosen", "metrics"),
    [
        ({"convolution": "loss_delta"}, ["loss_delta", "ssim", "sqnr", "ssim"]),
        ({"*.to_k": "output_kl", "cross_attention": "sqnr"}, ["sqnr", "output_kl", "output_kl", "ssim"]),
        ({"blocks.1.attn1.to_k": "ssim", "*": "output_kl"}, ["output_kl", "output_kl", "ssim", "output_kl"]),
        ({"*": "output_kl", "*.ff.*": "output_mse"}, ["output_kl", "output_kl", "output_kl", "output_mse"]),
    ],
)
def test_names_go_before_patterns_and_patterns_before_roles(
    chosen: dict[str, str], metrics: list[str]
) -> None:
    assert list(MetricDecoupled().decide(LAYERS, IMAGES, chosen).values()) == metrics


def test_a_pattern_must_match_a_layer() -> None:
    with pytest.raises(PatternError, match=r"Got '\*.attn3.\*'"):
        MetricDecoupled().decide(LAYERS, IMAGES, {"*.attn3.*": "ssim"})


def test_scores_are_parts_of_what_a_metric_can_lose() -> None:
    chance = np.random.default_rng(0)
    decided = {CONV.name: "sqnr", CROSS.name: "ssim", SELF.name: "sqnr", FEED.name: "output_kl"}
    better = {"sqnr": 1, "ssim": 1, "output_kl": -1}
    values = {name: chance.normal(5, 3, 3) for name in decided}
    rows = [
        ScoreRow(name, f"w{j}", metric, float(value), 0.5, 6)
        for name, metric in decided.items()
        for j, value in enumerate(values[name])
    ]
    others = [
        ScoreRow(CONV.name, "w0", "ssim", 1e9, None, 0),
        ScoreRow("unknown", "w0", "sqnr", 1e9, None, 0),
    ]
    found = {(row.layer, row.scheme): row for row in MetricDecoupled().combine([*rows, *others], decided)}
    assert len(found) == len(rows)
    for name, metric in decided.items():
        loss = max(better[metric] * values[name]) - better[metric] * values[name]
        span = sum(max(values[other]) - min(values[other]) for other in decided if decided[other] == metric)
        for j in range(3):
            row = found[name, f"w{j}"]
            assert row.value == pytest.approx(loss[j] / span)
            assert (row.metric, row.samples) == ("metric_decoupled", 6)
            assert row.stderr == pytest.approx(0.5 / span)
    for metric in better:
        worst = [max(found[n, f"w{j}"].value for j in range(3)) for n in decided if decided[n] == metric]
        assert sum(worst) == pytest.approx(1)


def test_choices_that_lose_nothing_score_zero() -> None:
    rows = [ScoreRow("a", scheme, "ssim", 1.0, 0.0, 4) for scheme in ("w4", "w8")]
    assert [row.value for row in MetricDecoupled().combine(rows, {"a": "ssim"})] == [0.0, 0.0]
