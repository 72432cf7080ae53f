"""What a keeper of a Ray actor makes of the actor's answers, without a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import RayTaskError

from quant.digest import file_digest
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.executors.confine import Isolation
from service.executors.protocol import Failure
from service.executors.ray_keeper import RayKeeper, Wanted
from service.executors.ray_scorer import versions
from service.executors.ray_settings import RaySettings


@pytest.fixture
def keeper(tmp_path: Path) -> RayKeeper:
    text = tmp_path / "words.txt"
    text.write_text("words")
    spec = SessionSpec(ModelSource("factory", "a:b", "aa"), DataSource(str(text), "text", file_digest(text)))
    return RayKeeper(Wanted(spec, "a:b", Isolation(), RaySettings("here:1")), 0)


def attempted(keeper: RayKeeper, monkeypatch: pytest.MonkeyPatch, **answers: Callable[[], Any]) -> Failure:
    """What becomes of a unit where the actor answers so."""
    said: dict[str, Callable[[], Any]] = {
        "about": lambda: {"host": "one", "versions": versions(), "open": True},
        "claim": lambda: "here",
        "open": tuple,
        **answers,
    }
    monkeypatch.setattr(keeper, "_new_actor", lambda: None)
    monkeypatch.setattr(keeper, "_call", lambda method, *_, **__: said[method]())
    failure = keeper.attempt(ScoreUnit("a", "w4", ("output_kl",)), lambda: None)
    assert isinstance(failure, Failure)
    return failure


def test_a_node_that_cannot_write_is_no_fault_of_the_files(
    keeper: RayKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise RayTaskError(
            "expect", "the disk is full", OSError(28, "No space left on device")
        ).as_instanceof_cause()

    failure = attempted(keeper, monkeypatch, claim=lambda: "send", expect=full)
    assert failure.kind == "worker_crash"
    assert "the disk is full" in failure.detail["log_tail"]


def test_a_unit_whose_actor_is_killed_has_no_error_of_its_own(
    keeper: RayKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        keeper.kill()
        raise AttributeError("'NoneType' object has no attribute 'run'")

    assert attempted(keeper, monkeypatch, run=run).kind == "worker_crash"
