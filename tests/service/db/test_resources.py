"""Uploads, blobs, models, calibration sets, plans, idempotency keys."""

from types import ModuleType
from typing import Any

import pytest

from service.db.engine import Database
from service.db.repositories import calibrations, idempotency, jobs, models, plans, uploads
from service.records import Cursor, PlanRecord
from service.states import InputState, JobKind, UploadState


def test_an_upload_keeps_its_manifest_and_completes(database: Database) -> None:
    manifest = [{"path": "config.json", "size": 2, "sha256": "aa"}]
    with database.write() as session:
        upload = uploads.create(session, purpose="model", manifest=manifest)
        assert upload.manifest == tuple(manifest)
        assert upload.state == UploadState.OPEN
        assert uploads.get(session, upload.id, tenant="other") is None
        with pytest.raises(LookupError, match="Upload must exist"):
            uploads.complete(session, upload.id, tenant="other")
        assert uploads.complete(session, upload.id).state == UploadState.COMPLETE
    with database.read() as session:
        found = uploads.get(session, upload.id)
        assert found is not None
        assert found.manifest == tuple(manifest)


def test_blobs_belong_to_a_tenant(database: Database) -> None:
    digests = [f"{index:064x}" for index in range(1200)]
    with database.write() as session:
        assert uploads.record_blob(session, digests[0], 3)
        assert not uploads.record_blob(session, digests[0], 3)
        assert uploads.record_blob(session, digests[1199], 2**40)
        assert uploads.known_blobs(session, digests) == {digests[0], digests[1199]}
        assert uploads.known_blobs(session, digests, tenant="other") == frozenset()
        blob = uploads.get_blob(session, digests[1199])
        assert blob is not None
        assert blob.size == 2**40
        assert uploads.get_blob(session, digests[0], tenant="other") is None


Json = dict[str, Any]
INPUTS: list[tuple[ModuleType, Json]] = [(models, {}), (calibrations, {"kind": "text"})]


@pytest.mark.parametrize(("repository", "more"), INPUTS)
def test_an_input_is_verified_then_ready(
    database: Database, repository: ModuleType, more: dict[str, Any]
) -> None:
    with database.write() as session:
        made = repository.create(session, source={"upload": "u"}, digest="aa", **more)
        assert (made.state, made.summary, made.problem) == (InputState.VERIFYING, None, None)
        assert repository.get(session, made.id) == made
        assert repository.get(session, made.id, tenant="other") is None
        assert repository.find_by_digest(session, "aa") == made
        ready = repository.set_state(session, made.id, InputState.READY, summary={"layers": 3})
        assert (ready.state, ready.summary) == (InputState.READY, {"layers": 3})
        deleted = repository.set_state(session, made.id, InputState.DELETED)
        assert deleted.summary == {"layers": 3}
        assert repository.set_state(session, made.id, InputState.READY).state == InputState.DELETED
        assert repository.find_by_digest(session, "aa") is None
        assert repository.list_page(session) == ()
        with pytest.raises(LookupError, match="must exist"):
            repository.set_state(session, "missing", InputState.READY)


@pytest.mark.parametrize(("repository", "more"), INPUTS)
def test_a_rejected_input_says_why(database: Database, repository: ModuleType, more: Json) -> None:
    with database.write() as session:
        made = repository.create(session, source={}, digest="aa", **more)
        bad = repository.set_state(session, made.id, InputState.REJECTED, problem={"detail": "no"})
        assert bad.problem == {"detail": "no"}
        assert repository.find_by_digest(session, "aa") is None


@pytest.mark.parametrize(("repository", "more"), INPUTS)
def test_inputs_have_pages(database: Database, repository: ModuleType, more: Json) -> None:
    with database.write() as session:
        made = [repository.create(session, source={}, digest=str(n), **more) for n in range(3)]
        repository.create(session, source={}, digest="x", tenant="other", **more)
        first = repository.list_page(session, limit=2)
        rest = repository.list_page(session, limit=2, after=Cursor(first[-1].created_at, first[-1].id))
    assert [record.id for record in (*first, *rest)] == [record.id for record in reversed(made)]


def plan(database: Database, job_id: str, budget: str = "4 bpw", **changes: Any) -> PlanRecord:
    values: dict[str, Any] = {
        "settings_digest": "s",
        "status": "optimal",
        "digest": "d",
        "document": {"b": 1, "a": {"z": 0.1, "y": 3.0}},
        "result": {"gap": 0.0},
    }
    with database.write() as session:
        return plans.insert(session, job_id=job_id, budget=budget, **{**values, **changes})


@pytest.fixture
def job_id(database: Database) -> str:
    with database.write() as session:
        return jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d").id


def test_a_plan_is_written_once_per_budget_and_settings(database: Database, job_id: str) -> None:
    first = plan(database, job_id)
    assert plan(database, job_id, status="feasible", digest="e") == first
    other = plan(database, job_id, settings_digest="t", document=None, digest=None, status="infeasible")
    assert other.document is None
    third = plan(database, job_id, "3 bpw")
    with database.read() as session:
        assert plans.list_job(session, job_id) == (first, other, third)
        assert plans.find(session, job_id, "4 bpw", "t") == other
        assert plans.get(session, first.id) == first
        assert plans.get(session, first.id, tenant="other") is None
        page = plans.list_page(session, job_id, limit=2)
        assert page == (third, other)
        assert plans.list_page(session, job_id, after=Cursor(other.created_at, other.id)) == (first,)


def test_documents_keep_their_order_and_numbers(database: Database, job_id: str) -> None:
    stored = plan(database, job_id)
    with database.read() as session:
        found = plans.get(session, stored.id)
    assert found is not None
    assert found.document is not None
    assert list(found.document) == ["b", "a"]
    assert repr(found.document) == "{'b': 1, 'a': {'z': 0.1, 'y': 3.0}}"


def test_evidence_comes_later(database: Database, job_id: str) -> None:
    stored = plan(database, job_id)
    assert stored.evidence is None
    with database.write() as session:
        after = plans.set_evidence(session, stored.id, {"samples": 8})
        assert (after.evidence, after.result) == ({"samples": 8}, {"gap": 0.0})
        assert plans.set_evidence(session, stored.id, {}, {"gap": 1.0}).result == {"gap": 1.0}
        with pytest.raises(LookupError, match="Plan must exist"):
            plans.set_evidence(session, "missing", {})


def test_an_idempotency_key_replays_its_answer(database: Database) -> None:
    with database.write() as session:
        assert idempotency.begin(session, "k", "body") is None
    with database.write() as session:
        pending = idempotency.begin(session, "k", "body")
        assert pending is not None
        assert pending.status is None
        assert idempotency.begin(session, "k", "body", tenant="other") is None
        idempotency.finish(session, "k", status=202, body={"id": "job_1"}, headers={"Location": "/v1"})
    with database.write() as session:
        again = idempotency.begin(session, "k", "another body")
        assert again is not None
        assert (again.status, again.body, again.headers) == (202, {"id": "job_1"}, {"Location": "/v1"})
        assert again.request_digest == "body"


def test_a_key_whose_request_died_is_new_again(database: Database) -> None:
    with database.read() as session:
        assert idempotency.begin(session, "k", "body") is None
    with database.write() as session:
        assert idempotency.begin(session, "k", "other") is None
        idempotency.finish(session, "k", status=200, body={})
