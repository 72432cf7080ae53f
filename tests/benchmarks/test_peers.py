"""The parts of the peers' benchmark that need no peer: reading answers, judging cells, the table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path() -> Iterator[None]:
    added = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


def cell(shift: float, *, same: bool = False, **changes: Any) -> Any:
    """Ours has `shift` more KL than a peer with 1.0, both noisy in the same samples."""
    from benchmarks.peer_cells import Cell

    noise = np.random.default_rng(0).normal(size=64)
    jitter = np.random.default_rng(1).normal(size=64) * 0.01
    fields = {"peer": "p", "model": "lm", "seed": 0, "budget": 3.0, "bytes": 100, "bits": 3.1}
    theirs = 1 + 0.1 * (noise - noise.mean())
    return Cell(**(fields | changes), theirs=theirs, ours=theirs + shift + jitter - jitter.mean(), same=same)


@pytest.mark.parametrize(
    ("shift", "outcome", "text"),
    [(-0.1, "win", ".90"), (0.1, "loss", "**1.10**"), (0.001, "even", "1.00 ="), (-0.002, "even", "1.00 =")],
)
def test_a_cell_is_judged_by_the_paired_interval(shift: float, outcome: str, text: str) -> None:
    from benchmarks.peer_cells import shown

    found = cell(shift)
    assert (found.outcome, shown(found)) == (outcome, text)
    assert found.difference.mean == pytest.approx(-shift)


def test_one_and_the_same_plan_is_neither_won_nor_lost() -> None:
    from benchmarks.peer_cells import shown

    assert (cell(0.0, same=True).outcome, shown(cell(0.0, same=True)), shown(None)) == ("same", "=", "-")


def test_the_table_has_seeds_in_order_and_says_why_a_peer_is_missing() -> None:
    from benchmarks.peer_cells import close_ones, counted, table

    cells = [cell(0.1, seed=1), cell(-0.1, seed=0), cell(-0.1, seed=0, model="cnn")]
    _, _, first, second = table("lm", cells, {"q": "needs a | GPU"}, ["p", "q"])
    assert first == "| p | -, - | .90, **1.10** | -, - | -, - | -, - |"
    assert second == "| q | needs a / GPU | | | | |"
    assert counted(cells) == "3 cells: 2 won, 0 not told apart, 0 the same plan, 1 lost"
    assert [line.rsplit("|", 2)[1].strip() for line in close_ones(cells)[2:]] == ["loss"]


def test_an_answer_must_have_a_scheme_for_every_layer_and_no_other() -> None:
    from benchmarks.environments import PeerFailed
    from benchmarks.peer_tools import Answer

    found = {"package": "tool", "version": "1.2", "seconds": 3.0, "plans": {"2.5": {"a": "w2", "b": "w4"}}}
    answer = Answer.of(["a", "b"], found)
    assert (answer.version, answer.plans) == ("tool 1.2", {2.5: {"a": "w2", "b": "w4"}})
    for layers in (["a"], ["a", "b", "c"]):
        with pytest.raises(PeerFailed, match=r"must name the model's \d layers\. At 2\.5: [bc]"):
            Answer.of(layers, found)


def test_a_script_that_fails_says_so_with_its_last_words(tmp_path: Path) -> None:
    from benchmarks.environments import PeerFailed, run_script

    script = tmp_path / "peer.py"
    script.write_text("import sys\nsys.exit('no such operator')")
    with pytest.raises(PeerFailed, match="^no such operator$"):
        run_script(Path(sys.executable), script)


@pytest.mark.parametrize(
    ("name", "bits", "group"), [("w4", 4, "channel"), ("w8-tensor", 8, "tensor"), ("w3-g48", 3, 48)]
)
def test_peers_read_scheme_names_as_bitplan_means_them(name: str, bits: int, group: int | str) -> None:
    from asked import Scheme

    from quant.schemes import parse_scheme

    assert (Scheme.of(name).bits, Scheme.of(name).group) == (bits, group)
    assert parse_scheme(name).name == name


def test_effective_bits_count_what_is_left_alone_with_16() -> None:
    from modelopt_plans import effective_bits

    assert effective_bits(3.0, 100, 100) == 3.0
    assert effective_bits(3.0, 100, 125) == pytest.approx((3 * 100 + 16 * 25) / 125)


def test_nncf_gets_a_ratio_for_the_two_widest_formats_that_reach_the_budget() -> None:
    from asked import Scheme
    from nncf_plans import METRICS, attempts

    schemes = [Scheme.of(name) for name in ("w2", "w3", "w4", "w8")]
    assert list(attempts(schemes, 2.5)) == [(2, 5.5 / 6, metric) for metric in METRICS]
    assert list(attempts(schemes, 4.0)) == [*((3, 0.8, metric) for metric in METRICS), (4, 1.0, METRICS[0])]


def test_aimets_steps_are_taken_until_the_average_is_the_budget() -> None:
    from aimet_plans import chosen
    from asked import Scheme

    schemes = [Scheme.of(name) for name in ("w2", "w4", "w8")]
    steps = [(("a",), 4), (("b",), 4), (("a",), 2), (("b",), 2)]
    plans = chosen(schemes, {"a": 1, "b": 3}, steps, [8.0, 7.0, 4.0, 1.0])
    assert [list(plan.values()) for plan in plans.values()] == [
        ["w8", "w8"],
        ["w4", "w8"],
        ["w4", "w4"],
        ["w2", "w2"],
    ]


def test_mcts_names_are_the_layers_again() -> None:
    from types import SimpleNamespace

    from asked import Scheme
    from mct_plans import widths

    def module(bits: int) -> SimpleNamespace:
        return SimpleNamespace(weights_quantizers={"weight": SimpleNamespace(num_bits=bits)})

    modules = {"a_0_conv_bn": module(8), "a_1": module(2), "relu": SimpleNamespace()}
    made = SimpleNamespace(named_modules=modules.items)
    schemes = [Scheme.of(name) for name in ("w2", "w8")]
    assert widths(schemes, ["a.0.conv", "a.1"], made) == {"a.0.conv": "w8", "a.1": "w2"}
