"""Searches over several objectives: the Pareto set in the plan resource, and trials that outlive the search."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from search.black_box import black_box
from search.choosers import CHOOSERS
from sensitivity.session import Session
from sensitivity.units import MeasureUnit
from service.app import create_app
from service.client import Client
from service.local import Local
from service.local_inputs import factory_source, file_data
from service.settings import Settings

PARAMETERS: dict[str, Any] = {
    "budgets": ["7 bpw"],
    "schemes": ["w2", "w3", "w4", "w5", "w6", "w8"],
    "samples": 8,
    "evaluations": 12,
    "interactions": False,
}
SOURCES = {"nsga2": "nsga2", "motpe": "motpe", "black_box": "black box"}


class Meter:
    """Every plan that is measured on the choosing part, in order; `most` of them end the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.most: int | None = None
        run, meter = Session.run, self

        def counting(session: Session, unit: Any) -> Any:
            if isinstance(unit, MeasureUnit) and unit.part == "choosing":
                if len(meter.keys) == meter.most:
                    raise KeyboardInterrupt
                meter.keys.append(unit.key)
            return run(session, unit)

        monkeypatch.setattr(Session, "run", counting)


@pytest.fixture
def search(tiny: Any, tmp_path: Path) -> Callable[..., Any]:
    """search(folder, **changes) -> (the job's record, its plan)."""
    model = tiny("mlp")

    def run(name: str, **changes: Any) -> Any:
        folder = tmp_path / name
        url = f"sqlite:///{folder}/bitplan.db"
        settings = Settings(data_dir=folder, database_url=url, executor="in_process", workers=1)
        with Local(settings) as local:
            source, data = factory_source(model.location, settings), file_data(model.data)
            wanted = local.request(local.model(source), local.calibration(data), PARAMETERS | changes)
            job = local.run(wanted)
            [plan] = local.plans(job.id)
            return job, plan

    return run


@pytest.mark.parametrize("chooser", ["nsga2", "motpe"])
def test_the_plan_tells_the_pareto_set_of_what_was_measured(search: Any, chooser: str) -> None:
    job, plan = search("a", chooser=chooser, budgets=["7 bpw,bytes<=1 GiB"])
    assert job.state == "succeeded", job.problem
    points = plan["pareto"]
    assert len(points) > 1
    assert chooser in {one["source"] for one in plan["candidates"]}
    names = {"loss", "bits_per_weight", "bytes"}
    for point in points:
        assert point["objectives"].keys() == names
        assert point["objectives"]["loss"] == point["measured"]["mean"]
        assert point["objectives"]["bytes"] == point["resources"]["bytes"]
        assert point["resources"]["bits_per_weight"] <= 7
        assert point["layers"].keys() == plan["document"]["layers"].keys()
    losses, sizes = ([point["objectives"][name] for point in points] for name in ("loss", "bytes"))
    assert losses == sorted(losses)
    assert sizes == sorted(sizes, reverse=True)
    assert losses[0] == min(one["measured"]["mean"] for one in plan["candidates"])


def test_a_plan_of_the_pareto_set_is_made_by_its_layers_as_pins(search: Any, tmp_path: Path) -> None:
    job, plan = search("a", chooser="nsga2", evaluations=4)
    url = f"sqlite:///{tmp_path}/a/bitplan.db"
    with TestClient(create_app(Settings(data_dir=tmp_path / "a", database_url=url))) as http:
        client = Client(str(http.base_url), http=http)  # type: ignore[arg-type]
        [found] = client.job(job.id).plans()
        assert found.pareto == plan["pareto"]
        cheapest = found.pareto[-1]
        [made] = client.job(job.id).solve(["7 bpw"], pins=cheapest["layers"])
    assert made.document is not None
    assert {name: layer["scheme"] for name, layer in made.document["layers"].items()} == cheapest["layers"]
    assert made.resource["resources"] == cheapest["resources"]


def test_the_seed_of_the_request_is_that_of_its_search(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    make = black_box.sampler
    watched = replace(black_box, sampler=lambda seed: seeds.append(seed) or make(seed))
    monkeypatch.setitem(CHOOSERS, "black_box", replace(CHOOSERS["black_box"], choose=watched))
    search("a", chooser="black_box", evaluations=1, seed=7)
    assert seeds == [7]


def test_a_search_by_the_loss_alone_has_no_pareto_set(search: Any) -> None:
    _, plan = search("a", chooser="black_box", evaluations=1)
    assert plan["pareto"] == []


@pytest.mark.parametrize(
    "chooser", ["nsga2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("motpe", "black_box"))]
)
def test_a_search_that_was_killed_goes_on_with_its_trials(
    search: Any, chooser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(monkeypatch)
    _, expected = search("undisturbed", chooser=chooser)
    assert sum(one["source"] == SOURCES[chooser] for one in expected["candidates"]) == 12
    whole, meter.keys = meter.keys, []
    meter.most = len(whole) - 5
    with pytest.raises(KeyboardInterrupt):
        search("killed", chooser=chooser)
    meter.most = None
    job, plan = search("killed", chooser=chooser)
    assert job.epoch > 1
    assert meter.keys == whole
    assert plan["digest"] == expected["digest"]
    assert plan["pareto"] == expected["pareto"]
    assert plan["candidates"] == expected["candidates"]


def test_more_evaluations_go_on_from_the_trials_of_fewer(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(monkeypatch)
    search("a", chooser="nsga2", evaluations=8)
    first, meter.keys = meter.keys, []
    _, plan = search("a", chooser="nsga2", evaluations=12)
    assert len(meter.keys) == 4
    assert not set(meter.keys) & set(first)
    assert sum(one["source"] == "nsga2" for one in plan["candidates"]) == 12


def test_the_command_prints_the_pareto_set(tiny: Any, run_factory: Callable[..., Any]) -> None:
    line = ("-b", "7bpw", "--evaluations", "4", "--no-interactions", "--chooser", "nsga2")
    found = run_factory(tiny("mlp"), *line)
    assert found.exit_code == 0, found.output
    assert "Pareto set at 7bpw, measured on the choosing part" in found.output
    [told] = json.loads(run_factory(tiny("mlp"), *line, "--json").stdout)
    best = told["pareto"][0]
    assert f"{best['objectives']['loss']:.4g}" in found.output
    assert all(scheme in found.output for scheme in best["layers"].values())
