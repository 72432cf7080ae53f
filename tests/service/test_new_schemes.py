"""A scheme added to a scored menu costs metrics of one backward pass its own products, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.scorers import gram_fisher
from sensitivity.units import BlockUnit
from service.db.repositories import scores, units
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.columns import Stored, joined, missing_part
from service.settings import Settings

PARAMETERS: dict[str, Any] = {
    "budgets": ["4 bpw"],
    "samples": 8,
    "sequence_length": 12,
    "evaluations": 0,
    "metrics": ["gram_fisher"],
}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    monkeypatch.setattr(gram_fisher, "MOST_DRAWS", 2 * gram_fisher.DRAWS)
    with _local(tmp_path / "data") as local:
        yield local


def _local(folder: Path) -> Local:
    url = f"sqlite:///{folder}/bitplan.db"
    return Local(Settings(data_dir=folder, database_url=url, executor="in_process", workers=1))


def search(local: Local, tiny: Any, schemes: list[str], **changes: Any) -> Any:
    model, data = local.model(folder_source(tiny.folder)), local.calibration(file_data(tiny.data))
    job = local.run(local.request(model, data, {**PARAMETERS, "schemes": schemes, **changes}))
    assert job.state == "succeeded", job.problem
    return job


def blocks(local: Local, job: Any) -> list[Any]:
    with local.database.read() as session:
        return [
            record
            for record in units.list_kind(session, str(job.score_set), "block")
            if record.job_id == job.id
        ]


def stored(local: Local, job: Any) -> dict[tuple[str, str], float]:
    with local.database.read() as session:
        rows = scores.list_all(session, str(job.score_set), ["gram_fisher"])
    return {(row.layer, row.scheme): row.value for row in rows}


def test_only_the_new_scheme_is_multiplied(local: Local, tiny: Any, tmp_path: Path) -> None:
    model = tiny("resnet")
    first = search(local, model, ["w2", "w4"])
    before = blocks(local, first)
    assert {tuple(record.unit["schemes"]) for record in before} == {("w2", "w4")}
    second = search(local, model, ["w2", "w3", "w4"])
    added = blocks(local, second)
    assert {tuple(record.unit["schemes"]) for record in added} == {("w3",)}
    assert {record.unit["block"] for record in added} <= {record.unit["block"] for record in before}
    third = search(local, model, ["w2", "w3", "w4"], budgets=["3 bpw"], pins={"*.layers.0.*": "w4"})
    assert blocks(local, third) == []
    with _local(tmp_path / "fresh") as fresh:
        alone = search(fresh, model, ["w2", "w3", "w4"])
        assert stored(local, second) == stored(fresh, alone)
        plans = [
            [plan["digest"] for plan in one.plans(job.id)] for one, job in ((local, second), (fresh, alone))
        ]
        assert plans[0] == plans[1]


def unit(layers: str, schemes: str) -> BlockUnit:
    return BlockUnit("fisher", "samples:0:8", tuple(schemes), tuple(layers))


def values(of: BlockUnit) -> dict[str, np.ndarray]:
    """Every cell is told apart by its layer and scheme."""
    cells = [[ord(layer) * 1000 + ord(scheme) for scheme in of.schemes] for layer in of.layers]
    return {"values": np.array(cells, dtype=np.float64) * np.arange(1, 4)[:, None, None]}


@pytest.mark.parametrize(
    ("wanted", "known", "missing"),
    [
        (unit("ab", "xy"), [], unit("ab", "xy")),
        (unit("ab", "xyz"), [unit("ab", "xy")], unit("ab", "z")),
        (unit("abc", "xy"), [unit("ab", "xy")], unit("c", "xy")),
        (unit("abc", "xyz"), [unit("ab", "xy")], unit("abc", "xyz")),
        (unit("ba", "yx"), [unit("ab", "x"), unit("ab", "yz")], None),
        (unit("ab", "xy"), [BlockUnit("taylor", "samples:0:8", ("x",), ("a", "b"))], unit("ab", "xy")),
    ],
)
def test_what_is_missing_and_what_is_joined(
    wanted: BlockUnit, known: list[BlockUnit], missing: BlockUnit | None
) -> None:
    assert missing_part(wanted, [Stored(one, "") for one in known]) == missing
    own = [one for one in known if one.metric == wanted.metric] + ([] if missing is None else [missing])
    found = joined(wanted, [(one, values(one)) for one in own])
    np.testing.assert_array_equal(found["values"], values(wanted)["values"])
