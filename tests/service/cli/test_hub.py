"""Models of a hub on the command line and through the client, here and at a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from quant.digest import folder_digest
from service.client import Client
from service.db.repositories import models
from service.hub.reference import BadReference
from service.local import Local, local_settings
from service.records import HUB
from service.remote.transport import ProblemError
from tests.service.hub_server import COMMIT, REPOSITORY, Hub, hub_serving

Tiny = Callable[[str], Any]
Bitplan = Callable[..., Result]
Answer = Callable[..., Any]
Few = tuple[str, ...]
REFERENCE = f"{REPOSITORY}@{COMMIT}"
ORIGIN = {"repository": REPOSITORY, "commit": COMMIT, "folder": ""}


@pytest.fixture(scope="module", autouse=True)
def hub(tiny: Tiny) -> Iterator[Hub]:
    """A hub with the tiny model, which all settings of this module name."""
    folder = tiny("resnet").folder
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with hub_serving(files) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITPLAN_HUB_ENDPOINT", hub.url)
        patch.setenv("BITPLAN_HUB", "true")
        patch.setenv("BITPLAN_HUB_OFFLINE", "false")
        yield hub


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A data directory of this test's own, into which nothing was fetched."""
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "own"))


def test_a_run_of_a_hub_is_that_of_the_folder(
    answer: Answer, tiny: Tiny, few: Few, hub: Hub, tmp_path: Path
) -> None:
    model = tiny("resnet")
    ask = ("-c", model.data, "-b", "5 bpw", *few)
    [own] = answer("run", model.folder, *ask, "-o", tmp_path / "own.json")
    [fetched] = answer("run", "--hub", REFERENCE, *ask, "-o", tmp_path / "fetched.json")
    assert (tmp_path / "own.json").read_bytes() == (tmp_path / "fetched.json").read_bytes()
    assert fetched["digest"] == own["digest"]
    assert (own["model"], fetched["model"]) == (None, ORIGIN)
    hub.asked.clear()
    answer("run", "--hub", REFERENCE, *ask)
    assert hub.asked == [], "what is here is used offline"


def test_fetch_writes_a_folder(
    own: None, answer: Answer, bitplan: Bitplan, tiny: Tiny, tmp_path: Path, hub: Hub
) -> None:
    out = tmp_path / "deep" / "model"
    told = answer("fetch", REFERENCE, "-o", out)
    assert told["digest"] == folder_digest(tiny("resnet").folder)[0] == folder_digest(out)[0]
    assert told["files"] == sorted(path.name for path in out.iterdir())
    again = bitplan("fetch", REFERENCE, "-o", out)
    assert again.exit_code == 2
    assert "must be a new folder" in again.stderr
    result = bitplan("fetch", REFERENCE, "-o", tmp_path / "second")
    assert result.exit_code == 0
    assert "wrote" in result.stdout


def test_a_model_that_a_server_has_not_fetched_yet_is_fetched(
    own: None, answer: Answer, tiny: Tiny, tmp_path: Path, hub: Hub
) -> None:
    with Local(local_settings()) as local, local.database.write() as session:
        models.create(session, source={"kind": HUB, **ORIGIN}, digest="0" * 64)
    told = answer("fetch", REFERENCE, "-o", tmp_path / "model")
    assert told["digest"] == folder_digest(tiny("resnet").folder)[0]
    hub.asked.clear()
    answer("fetch", REFERENCE, "-o", tmp_path / "again")
    assert hub.asked == []


def test_a_bar_shows_what_comes(own: None, bitplan: Bitplan, tmp_path: Path) -> None:
    assert "fetching" in bitplan("fetch", REFERENCE, "-o", tmp_path / "model").stderr


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (f"{REPOSITORY}@main", "git ls-remote"),
        (REPOSITORY, "all its 40"),
        (f"https://huggingface.co/{REPOSITORY}@{COMMIT}", "must be owner/name"),
        (f"someone/else@{COMMIT}", "Got 401"),
        (f"{REPOSITORY}@{'f' * 40}", "no such commit"),
        (f"{REPOSITORY}@{COMMIT}:unet", "must have files"),
    ],
)
def test_bad_references_are_bad_input(
    own: None, bitplan: Bitplan, tmp_path: Path, reference: str, words: str
) -> None:
    result = bitplan("fetch", reference, "-o", tmp_path / "model")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "model").exists()


def test_offline_means_offline(
    own: None, bitplan: Bitplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_HUB_OFFLINE", "true")
    result = bitplan("fetch", REFERENCE, "-o", tmp_path / "model")
    assert result.exit_code == 2
    assert "HF_HUB_OFFLINE" in result.stderr


def test_one_source_is_named(bitplan: Bitplan, tiny: Tiny) -> None:
    model = tiny("resnet")
    for words in (("run", model.folder, "--hub", REFERENCE), ("run",), ("submit",)):
        result = bitplan(*words, "-c", model.data, "-b", "5 bpw")
        assert result.exit_code == 2
        assert "A model must be given as" in " ".join(result.stderr.split())


def test_a_server_fetches_and_plans(
    server: str, monkeypatch: pytest.MonkeyPatch, answer: Answer, tiny: Tiny, few: Few
) -> None:
    monkeypatch.setenv("BITPLAN_SERVER", server)
    model = tiny("resnet")
    with Client(server) as client:
        fetched = client.hub_model(REFERENCE)
        assert (fetched["state"], fetched["source"]["commit"]) == ("ready", COMMIT)
        plans = answer("submit", "--hub", REFERENCE, "-c", model.data, "-b", "5 bpw", *few, "--watch")
        assert [plan["model"] for plan in plans] == [ORIGIN]
        [again] = client.job(plans[0]["job"]).solve(["6 bpw"])
        assert again.resource["model"] == ORIGIN


def test_a_rejected_model_is_told(server: str, hub: Hub) -> None:
    states: list[str] = []
    with Client(server) as client:
        with pytest.raises(ProblemError, match="no such commit") as caught:
            client.hub_model(f"{REPOSITORY}@{'f' * 40}", lambda model: states.append(model["state"]))
        assert (caught.value.status, caught.value.slug) == (404, "hub-not-found")
        with pytest.raises(BadReference):
            client.hub_model(f"{REPOSITORY}@main")
    assert set(states) <= {"verifying"}
