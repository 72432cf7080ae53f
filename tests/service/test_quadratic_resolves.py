"""Re-solves for the quadratic objective: the interactions that a search measured serve every later question."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from quant.costs import resources
from quant.layers import Inventory
from quant.schemes import parse_schemes
from sensitivity.session import Session
from sensitivity.units import ScoreUnit
from service.app import create_app
from service.db.repositories import jobs, scores
from service.local import Local
from service.local_inputs import factory_source, file_data
from service.settings import Settings

SCHEMES = ["w2", "w3", "w4", "w6"]
PARAMETERS: dict[str, Any] = {
    "budgets": ["7 bpw"],
    "schemes": SCHEMES,
    "samples": 8,
    "evaluations": 0,
    "objective": "quadratic",
}


class Searched:
    """Searches of one model on one data directory, and the API over the same."""

    def __init__(self, local: Local, http: TestClient, model: Any) -> None:
        self.local, self.http = local, http
        self._source, self._data = factory_source(model.location, local.settings), file_data(model.data)

    def job(self, **changes: Any) -> str:
        given = self.local.model(self._source), self.local.calibration(self._data)
        job = self.local.run(self.local.request(*given, PARAMETERS | changes))
        assert job.state == "succeeded", job.problem
        return str(job.id)

    def solve(self, job: str, **body: Any) -> Any:
        return self.http.post(f"/v1/jobs/{job}/plans", json={"budgets": ["7 bpw"]} | body)


@pytest.fixture(scope="module")
def searched(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("quadratic")
    url = f"sqlite:///{folder}/bitplan.db"
    settings = Settings(data_dir=folder, database_url=url, executor="in_process", workers=1)
    with Local(settings) as local, TestClient(create_app(settings)) as http:
        yield Searched(local, http, tiny("mlp"))


@pytest.fixture(scope="module")
def job(searched: Searched) -> str:
    return searched.job()


def test_a_resolve_gives_what_the_search_gave(
    searched: Searched, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's own objective holds in a re-solve that names none, and no model is run for it."""
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("a re-solve must not measure"))
    [own] = searched.local.plans(job)
    [again] = searched.solve(job).json()["items"]
    assert again["document"]["objective"] == again["source"] == "quadratic"
    assert again["objective"] == own["objective"]
    assert (again["bound"], again["parts"]) == (own["bound"], own["parts"])


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"budgets": ["5.5 bpw"]}, lambda plan: True),
        ({"objective": "quadratic: 0.25"}, lambda plan: True),
        ({"budgets": ["8 bpw"], "pins": {"2": "w3"}}, lambda plan: plan[1] == "w3"),
        ({"budgets": ["8 bpw"], "forbid": {"0": ["w6"]}}, lambda plan: plan[0] != "w6"),
        ({"budgets": ["6 bpw"], "ties": [["0", "2"]]}, lambda plan: plan[0] == plan[1]),
    ],
)
def test_new_budgets_pins_and_weights_are_solved_exactly(
    searched: Searched, job: str, body: Any, allowed: Any
) -> None:
    """Against every plan of the model, valued by its scores and the kept factor."""
    [plan] = searched.solve(job, **body).json()["items"]
    assert plan["status"] == "optimal"
    with searched.local.database.read() as session:
        record = jobs.get(session, job)
        assert record is not None
        rows = scores.list_all(session, str(record.score_set), ["output_kl"])
        layers = Inventory.from_json(jobs.inventory(session, job) or {}).layers
    summary = dict(record.summary or {})
    assert summary["interactions"]["metric"] == "gram_output"
    kept = searched.local.store.get_arrays(summary["interactions"]["factor"])
    sizes = resources(layers, parse_schemes(",".join(SCHEMES)))["bytes"]
    losses = {(row.layer, row.scheme): row.value for row in rows}
    weight = 0.25 if "objective" in body else 1.0
    limit = float(body.get("budgets", ["7 bpw"])[0].split()[0]) * sum(layer.parameters for layer in layers)

    def value(columns: tuple[int, ...]) -> float:
        cells = kept["factor"][np.arange(len(layers)), list(columns)]
        total = cells.sum(axis=0)
        alone = sum(losses[layer.name, SCHEMES[i]] for layer, i in zip(layers, columns, strict=True))
        return float(alone + weight * (total @ total - (cells**2).sum()))

    found = [
        value(columns)
        for columns in product(range(len(SCHEMES)), repeat=len(layers))
        if allowed([SCHEMES[column] for column in columns])
        and 8 * sum(int(sizes[row][column] or 0) for row, column in enumerate(columns)) <= limit
    ]
    assert len(found) > 1
    assert plan["objective"] == pytest.approx(min(found), rel=1e-6)


def test_what_was_not_measured_is_told(searched: Searched, job: str) -> None:
    answer = searched.solve(job, pins={"2": "w5"})
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:bitplan:problem:scores-missing")
    assert "score in output_kl. Got none for 2 x w5" in answer.json()["detail"]


def test_an_added_scheme_is_all_that_a_new_search_measures(
    searched: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores then serve the older search too, whose interactions lack it: that is said."""
    old, measured, run = searched.job(seed=1), [], Session.run
    monkeypatch.setattr(Session, "run", lambda own, unit: measured.append(unit) or run(own, unit))
    new = searched.job(seed=1, schemes=[*SCHEMES, "w5"])
    assert {unit.scheme for unit in measured if isinstance(unit, ScoreUnit)} == {"w5"}
    count = len(measured)
    assert searched.solve(new, pins={"2": "w5"}).status_code == 201
    assert searched.solve(old, pins={"2": "w5"}, objective="sum").status_code == 201
    answer = searched.solve(old, pins={"2": "w5"})
    assert answer.status_code == 409
    assert "must have interactions. Got none for 2 x w5 (1 in all)" in answer.json()["detail"]
    assert len(measured) == count


def test_a_search_that_declined_them_cannot_be_asked(searched: Searched) -> None:
    declined = searched.job(interactions=False, objective="sum")
    answer = searched.solve(declined, objective="quadratic")
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (422, "urn:bitplan:problem:invalid-objective")
    assert problem["pointer"] == "/objective"
    assert "Got a succeeded one without: it declined them" in problem["detail"]
