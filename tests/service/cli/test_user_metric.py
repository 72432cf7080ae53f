"""A search that a function of the user's own decides, from the command; HTTP never takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METRIC = """
def confidence(outputs, batch, reference):
    return -outputs.means(outputs.probabilities.max(-1).values)
"""
ASK = ("-b", "5 bpw", "--schemes", "w2,w4,w8", "--evaluations", "0", "--json")


def test_a_search_is_decided_by_it_and_its_evidence_tells_it(
    bitplan: Callable[..., Any], tiny: Any, few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_confidence.py").write_text(METRIC, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, *few, *ASK, "--user-metric", "own_confidence:confidence")
    answered = bitplan(*ask, "--metric", "user_metric")
    assert answered.exit_code == 0, answered.stderr
    plan = json.loads(answered.stdout)[0]
    assert plan["document"]["metric"] == "user_metric", plan["document"]
    entries = plan["evidence"]["entries"]
    assert all(-1 <= entry["quality"]["user_metric"]["mean"] <= 0 for entry in entries)


def test_what_is_wrong_with_it_is_bad_input(bitplan: Callable[..., Any], tiny: Any, few: Any) -> None:
    model = tiny("resnet")
    ask = ("run", model.folder, "-c", model.data, *few, *ASK)
    missing = bitplan(*ask, "--user-metric", "no_such_module:f")
    assert (missing.exit_code, "must be a file that Python can import" in missing.stderr) == (2, True)
    unnamed = bitplan(*ask, "--metric", "user_metric")
    assert (unnamed.exit_code, "which needs user_metric" in unnamed.stderr) == (2, True)
