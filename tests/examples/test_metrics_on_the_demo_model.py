"""The default mixture ranks measured plans at least as well as whatever costs no more, on a small scale."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import metrics
from quant.digest import folder_digest
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec

METRICS = ("output_kl", "gram_output", "output_mse", "fisher", "loss_delta", "weight_error", "random")
MENU = ("w2-asym-gptq", "w3-asym-gptq", "w4-asym-gptq", "w6-gptq")
NOISE = 0.01
"""Of a mean of Spearman coefficients: the best mixtures are this close to one another."""


@pytest.mark.slow  # trains a model for about 20 seconds, then scores 112 choices and measures 100 plans
def test_the_default_ranks_plans_best_among_those_that_cost_no_more(
    trained_lm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "BUDGETS", ("3 bpw",))
    model = ModelSource("folder", str(trained_lm.folder), folder_digest(trained_lm.folder)[0])
    data = DataSource(str(trained_lm.calibration), "jsonl", "held out")
    session = Session(SessionSpec(model, data, samples=24, sequence_length=128))
    result = metrics.run(metrics.Bench(session, MENU), "lm", METRICS, 50)
    metrics.print_table(result)
    limit = metrics.cost_of(result, metrics.DEFAULT)[0]
    rivals = [name for name in result.judged if metrics.cost_of(result, name)[0] <= limit]
    means = {name: metrics.mean_rho(result, name) for name in rivals}
    assert set(METRICS) < set(rivals)
    assert means[metrics.DEFAULT] > 0.9
    assert means[metrics.DEFAULT] >= max(means.values()) - NOISE
    assert means[metrics.DEFAULT] > max(means[name] for name in ("loss_delta", "weight_error"))
    capsys.readouterr()
    metrics.verdict([result])
    first, second = re.findall(r"(?:first|second) `(.+?)`", capsys.readouterr().out)
    assert [first, second] == sorted(means, key=lambda name: -means[name])[:2]
