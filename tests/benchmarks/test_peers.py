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
    added = [str(ROOT), str(ROOT / "benchmarks" / "peers")]
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
