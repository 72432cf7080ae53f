"""Calibration data made from a model alone: by the command, and by a job that a server runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from service.app import create_app
from service.cli.main import app as command
from service.db.repositories import models
from service.errors import TooLarge
from service.made_calibration import units_of, write_samples
from service.runner.catalog import load_handlers
from service.runner.loop import Runner
from service.settings import Settings
from service.states import InputState
from service.wire import MakeCalibrationRequest

Tiny = Callable[[str], Any]
ASKED = {"method": "random_tokens", "samples": 70, "sequence_length": 12, "seed": 5}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BITPLAN_EXECUTOR", "in_process")
    monkeypatch.setenv("BITPLAN_WORKERS", "1")
    return Settings()


def test_the_command_writes_what_a_search_reads(settings: Settings, tiny: Tiny, tmp_path: Path) -> None:
    folder, file = tiny("llama").folder, tmp_path / "made.safetensors"
    asked = ["--method", "random_tokens", "--samples", "70", "--sequence-length", "12", "--seed", "5"]
    result = CliRunner().invoke(command, ["calibrate", str(folder), *asked, "-o", str(file)])
    assert result.exit_code == 0, result.stderr
    assert "wrote 70 samples" in result.stdout
    tokens = load_file(file)["input_ids"]
    assert (tokens.shape, tokens.dtype) == ((70, 12), np.int64)
    menu = ["--schemes", "w4,w8", "--samples", "8", "--evaluations", "0", "-b", "6 bpw", "--metric", "fisher"]
    run = CliRunner().invoke(command, ["run", str(folder), "-c", str(file), *menu, "--no-interactions"])
    assert run.exit_code == 0, run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic", "-o", "a.safetensors"], "A method must be one of random_tokens"),
        (["--method", "random_tokens", "-o", "a.txt"], "--output must end in .safetensors. Got 'a.txt'"),
        (["--method", "batch_norm_images", "-o", "a.safetensors"], "with batch norms. Got none"),
        (
            [
                "--method",
                "random_tokens",
                "--samples",
                "99999",
                "--sequence-length",
                "999999",
                "-o",
                "a.safetensors",
            ],
            "Calibration data must have at most 68719476736 bytes in all",
        ),
        (
            ["--method", "batch_norm_images", "--shape", "3,8192,8192", "-o", "a.safetensors"],
            "A shape must have at most 67108864 numbers",
        ),
        (["--method", "random_tokens", "-o", "/dev/null/a.safetensors"], "--output must be inside a folder"),
        (["--method", "batch_norm_images", "--shape", "8", "-o", "a.safetensors"], "channels, height and"),
        (["--method", "batch_norm_images", "--shape", "8,x", "-o", "a.safetensors"], "three whole numbers"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], words: str, settings: Settings, tiny: Tiny) -> None:
    result = CliRunner().invoke(command, ["calibrate", str(tiny("llama").folder), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_server_makes_them_and_asking_twice_is_one_job(
    settings: Settings, tiny: Tiny, tmp_path: Path
) -> None:
    with TestClient(create_app(settings)) as http:
        database = http.app.state.context.database  # type: ignore[attr-defined]
        with database.write() as session:
            place = {"kind": "local", "folder": str(tiny("llama").folder)}
            model = models.create(session, source=place, digest="aa", state=InputState.READY)
        path = f"/v1/models/{model.id}/calibrations"
        asked, again = http.post(path, json=ASKED), http.post(path, json=ASKED)
        assert (asked.status_code, again.json()["id"]) == (202, asked.json()["id"])
        assert asked.json()["kind"] == "make_calibration"
        Runner(settings, database, load_handlers()).run_job(asked.json()["id"])
        job = http.get(f"/v1/jobs/{asked.json()['id']}").json()
        assert job["state"] == "succeeded", job["problem"]
        made = http.get(f"/v1/calibrations/{job['summary']['calibration']}").json()
        assert (made["state"], made["summary"]["rows"]) == ("ready", 70)
        assert http.post(path, json=ASKED).json()["id"] == job["id"]
        http.delete(f"/v1/calibrations/{made['id']}")
        assert http.post(path, json=ASKED).json()["id"] != job["id"]
        assert http.post(path, json={**ASKED, "method": "magic"}).status_code == 422
        huge = http.post(path, json={**ASKED, "samples": 100_000, "sequence_length": 2**20})
        assert (huge.status_code, huge.json()["type"]) == (413, "urn:bitplan:problem:too-large")
        assert f"Got {100_000 * 2**20 * 8}" in huge.json()["detail"]
        assert http.post("/v1/models/model_x/calibrations", json=ASKED).status_code == 404
        assert {item["name"] for item in http.get("/v1/calibration-methods").json()["items"]} >= {
            "random_tokens",
            "generated_tokens",
            "batch_norm_images",
        }


def test_a_file_is_written_part_by_part_as_safetensors_writes_it(tmp_path: Path) -> None:
    chance, read = np.random.default_rng(0), []
    parts = [
        {
            "input_ids": chance.integers(0, 9, (rows, 5)),
            "pixel_values": chance.random((rows, 2, 3), np.float32),
        }
        for rows in (3, 1, 4)
    ]

    def lazily() -> Iterator[Any]:
        for number, part in enumerate(parts):
            read.append(number)
            yield part

    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    save_file(whole, tmp_path / "expected.safetensors")
    write_samples(lazily(), 8, tmp_path / "made.safetensors", 10**6)
    assert (tmp_path / "made.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    read.clear()
    with pytest.raises(TooLarge, match="at most 511 bytes in all. Got 512. Ask for fewer"):
        write_samples(lazily(), 8, tmp_path / "large.safetensors", 511)
    assert read == [0]
    assert not (tmp_path / "large.safetensors").exists()


def test_large_samples_come_in_small_units() -> None:
    request = MakeCalibrationRequest(method="random_tokens", samples=40, sequence_length=2**20)
    bounds = [(unit.start, unit.stop) for unit in units_of(request)]
    assert bounds == [(start, start + 8) for start in range(0, 40, 8)]
