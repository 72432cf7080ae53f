from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.layers import Inventory
from sensitivity.errors import BadModel, BadPattern, BadUnit, ModelHasNothingToQuantize
from sensitivity.model_check import ModelCheck
from sensitivity.spec import ModelSource
from sensitivity.units import InspectUnit, MeasureUnit


def test_a_model_is_checked_without_data(tiny: Any) -> None:
    spec = tiny("llama").spec()
    facts = ModelCheck(spec).run(InspectUnit()).facts
    assert (facts["task"], facts["divergence"], facts["dtype"]) == ("causal_lm", "kl", "float32")
    layers = Inventory.from_json(facts["inventory"]).layers
    assert len(layers) == 14
    assert {layer.macs for layer in layers} == {None}


def test_the_digest_is_that_of_modules_and_weights(tiny: Any) -> None:
    first, second = (ModelCheck(tiny("mlp").spec()) for _ in range(2))
    digest = first.run(InspectUnit()).facts["digest"]
    assert second.run(InspectUnit()).facts["digest"] == digest
    second._model[0].weight.data[0, 0] += 1
    assert second.run(InspectUnit()).facts["digest"] != digest
    assert ModelCheck(tiny("llama").spec()).run(InspectUnit()).facts["digest"] != digest


def test_what_the_files_lack_is_never_allocated(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny("llama").folder, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**26, "num_hidden_layers": 40}))
    spec = replace(tiny("llama").spec(), model=ModelSource("folder", str(folder), "d"))
    monkeypatch.setattr(
        "sensitivity.model_check.load_model", lambda *_: pytest.fail("weights were allocated")
    )
    with pytest.raises(BadModel, match=r"shape that config.json says. Got lm_head.weight"):
        ModelCheck(spec)


def test_what_cannot_be_planned_is_refused(tiny: Any) -> None:
    check = ModelCheck(tiny("mlp").spec())
    with pytest.raises(ModelHasNothingToQuantize):
        check.run(InspectUnit(exclude=("*",)))
    with pytest.raises(BadPattern, match="nowhere"):
        check.run(InspectUnit(exclude=("nowhere",)))
    with pytest.raises(BadUnit, match="must be asked to inspect"):
        check.run(MeasureUnit((), "choosing"))
