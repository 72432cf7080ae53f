"""Runtime profiles as a whole; their rules one by one are in test_lint.py."""

from __future__ import annotations

import pytest

from quant.runtime_rules import Runtime, Target
from quant.runtimes import RUNTIMES, default_menu
from quant.schemes import parse_schemes

ROUND = Target("model.layers.0.mlp.up_proj", "linear", (1024, 1024), embedding=False, head=False)
ODD = Target("model.layers.0.mlp.up_proj", "linear", (100, 98), embedding=False, head=False)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_the_default_menu_of_a_runtime_is_one_that_it_runs(runtime: Runtime) -> None:
    assert runtime.menu
    for scheme in parse_schemes(runtime.menu):
        assert runtime.refuses(ROUND, scheme) is None, scheme.name
        assert scheme.weight.refuses(ROUND.matrix) is None, scheme.name


@pytest.mark.parametrize("runtime", [RUNTIMES[name] for name in RUNTIMES if name not in ("vllm", "mlx")])
def test_a_layer_of_any_shape_gets_a_scheme(runtime: Runtime) -> None:
    """vLLM and MLX have no kernel at all for sides like these."""
    offered = [
        scheme
        for scheme in parse_schemes(runtime.menu)
        if runtime.refuses(ODD, scheme) is None and scheme.weight.refuses(ODD.matrix) is None
    ]
    assert offered


def test_the_default_menu_is_that_of_no_runtime_in_particular() -> None:
    assert default_menu(None) == RUNTIMES["generic"].menu == default_menu("generic")
    assert len(parse_schemes(default_menu())) == 6


def test_vllms_menu_has_scales_that_a_bfloat16_model_holds() -> None:
    """vLLM loads scales in the model's type; most models are stored in bfloat16."""
    scales = {
        getattr(scheme.weight, "scale_type", "bfloat16") for scheme in parse_schemes(default_menu("vllm"))
    }
    assert scales == {"bfloat16"}
