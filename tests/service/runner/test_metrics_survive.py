"""Every metric is measured to the same scores when its worker dies on the way, and one unit is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensitivity.catalog import SCORERS
from sensitivity.scorers import gram_fisher
from sensitivity.spec import SessionSpec
from sensitivity.units import InspectUnit, Unit
from sensitivity.user_code import user_metric
from service.db.engine import Database
from service.db.repositories import scores
from service.executors.in_process import InProcess
from service.executors.protocol import DEFAULT_SESSION, ExecutorSettings, Failure, Outcome
from service.runner.context import JobContext
from service.runner.lab import Lab
from service.settings import Settings

SCHEMES = ("w2", "w4")
DEATH = 2
"""The worker dies in this unit of a metric, or in its last if it has fewer."""
MODELS = {"ssim": "denoiser", "router_kl": "mixtral"}
METRICS = [name for name, metric in SCORERS.items() if metric.unit != "roles"]
OWN = "def size(outputs, batch, reference):\n    return outputs.means(outputs.rows.square().sum(-1))\n"


class Mortal:
    """The in-process executor, whose session is lost once with the unit that it was measuring."""

    name, capacity = "mortal", 1

    def __init__(self, settings: ExecutorSettings, death: int | None) -> None:
        self._settings, self._death, self._inner = settings, death, InProcess(settings)
        self._spec: SessionSpec | None = None
        self._waiting: list[tuple[str, Unit]] = []
        self.measured: list[str] = []

    def start(self, spec: SessionSpec) -> None:
        self._spec = spec
        self._inner.start(spec)

    def submit(self, key: str, unit: Unit) -> None:
        self._waiting.append((key, unit))

    def wait(self, timeout: float) -> list[Outcome]:
        if not self._waiting:
            return []
        key, unit = self._waiting.pop(0)
        self._inner.submit(key, unit)
        outcomes = self._inner.wait(timeout)
        if not isinstance(unit, InspectUnit):
            self.measured.append(key)
            if len(self.measured) == self._death:
                self._inner.close(0)
                self._inner = InProcess(self._settings)
                assert self._spec is not None
                self._inner.start(self._spec)
                return [Outcome(key, failure=Failure("worker_crash", "killed", {}))]
        return outcomes

    def close(self, grace_seconds: float = 10.0) -> None:
        self._inner.close(grace_seconds)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Nobody sends heartbeats here."""
    return settings.model_copy(update={"lease_seconds": 3600})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "surviving_metric.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "surviving_metric:size"


@pytest.mark.slow
@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("metric", METRICS)
def test_a_death_costs_one_unit_and_no_score(
    metric: str,
    own: str,
    tiny: Any,
    new_context: Callable[..., JobContext],
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gram_fisher, "MOST_DRAWS", 2 * gram_fisher.DRAWS)
    spec = tiny(MODELS.get(metric, "resnet")).spec()
    if metric == "user_metric":
        spec = replace(spec, user_metric=user_metric(own))

    def run(seed_of_set: str, death: int | None) -> tuple[list[Any], list[str]]:
        mortal = Mortal(ExecutorSettings(1, settings.data_dir, DEFAULT_SESSION), death)
        context = new_context(lambda _: mortal)
        one = replace(spec, model=replace(spec.model, digest=seed_of_set))
        with Lab(context, one) as lab:
            facts = lab.inspect()
            layers = [layer["name"] for layer in facts["inventory"]["layers"]][:2]
            choices = dict.fromkeys(layers, SCHEMES)
            lab.score(choices, dict.fromkeys(layers, (metric,)), int(facts["samples"]["scoring"]))
            with database.read() as session:
                stored = scores.list_all(session, lab.score_set, [metric])
        rows = [(row.layer, row.scheme, row.value, row.stderr, row.samples) for row in stored]
        return rows, mortal.measured

    undisturbed, units = run("whole", None)
    assert len(undisturbed) == 2 * len(SCHEMES)
    disturbed, again = run("killed", min(DEATH, len(units)))
    assert disturbed == undisturbed
    assert len(again) == len(units) + 1
    assert sorted(set(again)) == sorted(set(units))
