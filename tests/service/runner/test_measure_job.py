"""The request that measures a plan which was solved again from a search's stored scores."""

from __future__ import annotations

from typing import Any

import pytest

from service.costing import cost_request
from service.planning.ask import Ask
from service.runner.measure_job import measured_request
from service.runner.problems import JobFailed
from service.wire import JobRequest

BASE = {"model": "m", "calibration": "c", "budgets": ["4 bpw"], "schemes": ["w2", "w4"]}


def searched(**members: Any) -> dict[str, Any]:
    found: dict[str, Any] = JobRequest.model_validate({**BASE, **members}).model_dump(mode="json")
    return found


def asked(search: dict[str, Any], metric: str, **costs: Any) -> dict[str, Any]:
    """What a plan of another budget keeps of its question; `costs` are what its request says of them."""
    return Ask("3 bpw", metric=metric, costs=cost_request(costs, search).members).as_request(metric)


def test_contexts_stay_planned_by_the_metric_that_can_be_split() -> None:
    search = searched(metrics=["output_kl", "weight_error"], contexts={"plans": "weighted"})
    request = measured_request(search, asked(search, "weight_error"))
    assert (request.metrics, request.budgets) == (["output_kl", "weight_error"], ["3 bpw"])


def test_a_latency_of_the_question_takes_the_place_of_the_table() -> None:
    search = searched(latency_ns={"a": {"w2": 1.0, "w4": 2.0}}, deployment={"batch": 4})
    request = measured_request(search, asked(search, "output_kl", latency="roofline:h100"))
    assert (request.latency, request.latency_ns) == ("roofline:h100", None)
    assert request.deployment is not None
    assert request.deployment.batch == 4
    same = measured_request(search, asked(search, "output_kl"))
    assert (same.latency, same.latency_ns) == (None, search["latency_ns"])


@pytest.mark.parametrize(
    ("others", "metric", "refine"),
    [
        (["sqnr"], "sqnr", None),
        (["weight_error"], "weight_error", None),
        (["sqnr"], "output_kl", "output_kl"),
        ([], "gram_fisher", None),
    ],
)
def test_only_a_plan_of_the_refining_metric_refines(
    others: list[str], metric: str, refine: str | None
) -> None:
    search = searched(metrics=["fisher", *others], refine_metric="output_kl")
    request = measured_request(search, asked(search, metric))
    added = [metric] if metric == "gram_fisher" else []
    assert (request.metrics, request.refine_metric) == (["fisher", *others, *added], refine)
    assert search["interactions"]
    assert not request.interactions


def test_a_plan_within_a_limit_on_the_refining_metric_refines() -> None:
    search = searched(metrics=["fisher", "sqnr"], refine_metric="output_kl")
    ask = Ask("3 bpw", ("output_kl<=0.5",), metric="sqnr").as_request("sqnr")
    assert measured_request(search, ask).refine_metric == "output_kl"


@pytest.mark.parametrize("objective", ["quadratic", "worst: output_kl@0, output_kl@1"])
def test_what_a_plan_was_solved_for_is_nothing_to_its_measurement(objective: str) -> None:
    search = searched(metrics=["output_kl"])
    request = measured_request(search, {**asked(search, "output_kl"), "objective": objective})
    assert request.objective == "sum"


def test_a_request_that_is_not_taken_any_more_is_told() -> None:
    search = {**searched(metrics=["output_mse"], contexts={}), "refine_metric": "output_kl"}
    with pytest.raises(JobFailed, match="still taken. Got: A refining metric must decide over all samples"):
        measured_request(search, asked(search, "output_mse"))
