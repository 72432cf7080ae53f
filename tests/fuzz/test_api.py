"""Every operation of the committed OpenAPI document is sent what fits its schema, what does not, and sound
requests with single members exchanged. The answer must be one that the document describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.access import Scope, new_key
from service.app import create_app
from service.db.repositories import keys
from service.settings import Settings
from tests.fuzz.effort import Effort
from tests.service.api.conftest import Api, FakeRunner

SCHEMA = schemathesis.openapi.from_path(Path(__file__).parents[2] / "docs" / "openapi.json")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
BLOB = b"one\ntwo\nthree\nfour\nfive\nsix\n"


def operations() -> list[Any]:
    """All of them; those that take away what others read come last."""
    found = [result.ok() for result in SCHEMA.get_all_operations()]
    return sorted(found, key=lambda operation: operation.method == "delete")


@dataclass
class House:
    """A service with one of everything; `places` are ids that exist, `bodies` sound requests."""

    http: TestClient
    headers: dict[str, str]
    finished: str
    places: dict[str, list[str]]
    bodies: dict[str, Any]

    def answer(self, case: Any, accept: str | None) -> Any:
        """The response to a case, byte for byte as a client of its own would send it."""
        sent = case.as_transport_kwargs(base_url="http://localhost")
        sent = {
            key: sent[key] for key in ("method", "url", "headers", "params", "data", "json") if key in sent
        }
        prepared = requests.Request(**sent).prepare()
        headers = {name: _encoded(value) for name, value in prepared.headers.items()}
        headers |= {name: value.encode() for name, value in self.headers.items()}
        headers |= {} if accept is None else {"Accept": accept.encode()}
        return self.http.request(prepared.method, prepared.url, headers=headers, content=prepared.body)


def _encoded(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")


@pytest.fixture(scope="module", params=["local", "key"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "models").mkdir()
    settings = Settings(
        data_dir=folder / "data",
        model_folders=(folder / "models",),
        rate_limit=0,
        quota_jobs=0,
        log_level="error",
    )
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as http:
        if request.param == "key":
            made = new_key()
            with app.state.context.database.write() as session:
                keys.create(
                    session,
                    tenant="default",
                    name="",
                    scope=Scope.ADMIN,
                    prefix=made.prefix,
                    digest=made.digest,
                )
            http.headers["Authorization"] = f"Bearer {made.token}"
        yield furnished(http, request.param == "key")


def furnished(http: TestClient, keyed: bool) -> House:
    """The house with a model, a finished and a queued search, plans, and an open upload."""
    api = Api(http)
    runner = FakeRunner(api)
    finished = api.submit(budgets=["4 bpw", "0.5 bpw"], metrics=["output_kl", "weight_error"])
    runner.run(finished["id"])
    runner.verify(finished["request"]["model"])
    queued = api.submit(budgets=["3 bpw"])
    files = api.manifest({"calibration.txt": BLOB}, "calibration")
    upload = http.post("/v1/uploads", json=files).json()
    plans = http.get(f"/v1/jobs/{finished['id']}/plans").json()["items"]
    model, calibration = finished["request"]["model"], finished["request"]["calibration"]
    places = {
        "upload_id": [upload["id"]],
        "sha256": [files["files"][0]["sha256"]],
        "model_id": [model],
        "calibration_id": [calibration],
        "job_id": [finished["id"], queued["id"]],
        "plan_id": [plan["id"] for plan in plans],
        "consumer": [consumer["name"] for consumer in http.get("/v1/exports").json()["items"]],
    }
    bodies = {
        "create_upload": files,
        "put_blob": BLOB,
        "patch_blob": BLOB,
        "create_model": {"upload": upload["id"]},
        "create_calibration": {"upload": upload["id"]},
        "make_calibration": {"method": "distilled", "samples": 6},
        "submit": {"model": model, "calibration": calibration, "budgets": ["4 bpw"], "schemes": ["w2", "w4"]},
        "resume": {},
        "correlate": {"plans": 8},
        "solve_again": {"budgets": ["4 bpw"]},
        "write_checkpoint": {"consumer": "pytorch"},
    }
    headers = {"Authorization": http.headers["Authorization"]} if keyed else {}
    return House(http, headers, finished["id"], places, bodies)


def furnish(draw: Any, case: Any, house: House) -> None:
    """Give a case ids that exist, and a sound body with some of its own members."""
    for name in case.path_parameters or {}:
        if name in house.places and draw(st.integers(0, 4)):
            case.path_parameters[name] = draw(st.sampled_from(house.places[name]))
    headers = case.headers or {}
    if "wait" in str(headers.get("Prefer", "")):
        del headers["Prefer"]  # it would wait
    sound = house.bodies.get(case.operation.definition.raw["operationId"])
    if sound is None or not draw(st.integers(0, 3)):
        return
    if isinstance(sound, bytes):
        case.body = draw(st.sampled_from([sound, sound[:9], sound[9:], sound * 2]))
        return
    own = case.body if isinstance(case.body, dict) else {}
    chosen = draw(st.lists(st.sampled_from(sorted(own)), max_size=2, unique=True)) if own else []
    case.media_type, case.body = "application/json", sound | {name: own[name] for name in chosen}


@pytest.mark.parametrize(
    "operation", operations(), ids=lambda operation: operation.definition.raw["operationId"]
)
def test_every_answer_is_one_of_the_documented(operation: Any, house: House, effort: Effort) -> None:
    modes = schemathesis.GenerationMode
    cases = st.one_of(
        *(operation.as_strategy(generation_mode=mode) for mode in (modes.POSITIVE, modes.NEGATIVE))
    )
    ident = operation.definition.raw["operationId"]
    checks = CHECKS[1:] if ident == "readyz" else CHECKS  # 503 is its way to say no

    @given(case=cases, data=st.data())
    def run(case: Any, data: Any) -> None:
        furnish(data.draw, case, house)
        ended = (case.path_parameters or {}).get("job_id") == house.finished
        stream = ident == "list_events" and ended and data.draw(st.booleans())
        response = house.answer(case, "text/event-stream" if stream else None)
        case.validate_response(response, checks=checks)

    effort.check(run, 2 if house.headers else 6)
