"""What the fuzzers have found, one small request each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sensitivity.calibration_check import check_calibration
from sensitivity.errors import BadCalibration
from service.app import create_app
from service.errors import Unprocessable
from service.ingest.local_folder import allowed_folder
from service.ingest.strict_json import parse_json
from service.settings import Settings


@pytest.fixture
def http(tmp_path: Path, database_url: str) -> Any:
    with TestClient(create_app(Settings(data_dir=tmp_path / "data", database_url=database_url))) as http:
        yield http


def test_ids_with_a_nul(http: TestClient) -> None:
    """PostgreSQL refuses to compare them."""
    assert 400 <= http.get("/v1/jobs/%00").status_code < 500
    assert 400 <= http.post("/v1/models", json={"upload": "a\0"}).status_code < 500


def test_numbers_and_levels_beyond_the_parser(http: TestClient) -> None:
    for body in (b'{"seed":' + b"9" * 5000 + b"}", b"[" * 100_000):
        answer = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:bitplan:problem:invalid-json")


@pytest.mark.parametrize("name", ["a\0b", "a" * 1500])
def test_folders_that_no_file_system_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="folder must") as found:
        allowed_folder(f"{tmp_path}/{name}", [tmp_path])
    assert 400 <= found.value.status < 500  # type: ignore[attr-defined]


def test_half_of_a_surrogate_pair() -> None:
    """It cannot be sent back, so the answer failed."""
    with pytest.raises(Unprocessable, match="surrogate"):
        parse_json(b'{"architectures": ["\\ud800"]}', what="config.json")
    assert parse_json(b'"\\ud83d\\ude00"', what="config.json") == "\U0001f600"


@pytest.mark.parametrize(
    ("names", "shape"), [('"\\ud800"', [6, 2]), ('"x"', [6, 2] + [1] * 20), ('"x": {}, "x"', [6, 2])]
)
def test_headers_of_calibration_files(tmp_path: Path, names: str, shape: list[int]) -> None:
    entry = json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [0, 48]})
    header = f"{{{names}: {entry}}}".encode()
    file = tmp_path / "data.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    with pytest.raises(BadCalibration, match="Header of"):
        check_calibration(file, "safetensors")
