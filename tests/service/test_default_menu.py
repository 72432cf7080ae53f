from __future__ import annotations

import pytest
from pydantic import ValidationError

from quant.runtimes import RUNTIMES, default_menu
from service.wire import JobRequest

REQUEST = {"model": "model_1", "calibration": "cal_1", "budgets": ["4 bpw"]}


@pytest.mark.parametrize("runtime", [None, *RUNTIMES])
def test_a_request_without_schemes_gets_its_runtimes_menu(runtime: str | None) -> None:
    request = JobRequest.model_validate({**REQUEST, "runtime": runtime})
    assert tuple(request.schemes) == default_menu(runtime)


def test_named_schemes_stay() -> None:
    assert JobRequest.model_validate({**REQUEST, "schemes": ["w4"], "runtime": "mlx"}).schemes == ["w4"]


@pytest.mark.parametrize("runtime", ["tpu", 3, ["vllm"]])
def test_an_unknown_runtime_is_the_only_fault(runtime: object) -> None:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate({**REQUEST, "runtime": runtime})
    assert [error["loc"] for error in caught.value.errors()] == [("runtime",)]


@pytest.mark.parametrize("where", ["budgets", "limits"])
def test_a_uniform_limit_names_a_scheme_of_the_menu(where: str) -> None:
    with pytest.raises(ValidationError, match=r"must name a scheme of the menu: w2-asym-adaround.* Got 'w4'"):
        JobRequest.model_validate({**REQUEST, where: ["uniform w4"]})
    for schemes, name in (["w4", "w8"], "w4-channel"), (["w8"], "w8"):
        JobRequest.model_validate({**REQUEST, "schemes": schemes, where: [f"uniform {name}"]})
    pinned = {"schemes": ["w8"], "pins": {"head": "w4"}, where: ["uniform w4"]}
    JobRequest.model_validate({**REQUEST, **pinned})
