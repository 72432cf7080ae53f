"""A made history that breaks an invariant is found by the check of that invariant; a sound one by none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import CHECKS, REACHABLE, check, main
from tests.chaos.final import Final, load_final
from tests.chaos.history import History, Seen, load_history

LEASE = dict.fromkeys(("lease_owner", "lease_host", "lease_pid", "lease_process", "lease_expires_at"))
SCORE = {"layer": "fc", "scheme": "w4", "metric": "output_kl", "value": 0.25, "stderr": 0.01, "samples": 8}
OTHER = {**SCORE, "scheme": "w8", "value": 0.125}
DIGEST = "d" * 64
PROBLEM = {"type": "urn:bitplan:problem:worker-crash"}
Break = Callable[[list[Seen], Final], tuple[list[Seen], Final]]


def job(ident: str = "job_1", **members: Any) -> dict[str, Any]:
    request = {"labels": {"request": ident}}
    return {
        "id": ident, "kind": "search", "state": "succeeded", "request": request, "score_set": "set",
        "predecessor": None, "problem": None, **LEASE, **members,
    }  # fmt: skip


def story(ident: str, *types: str) -> list[dict[str, Any]]:
    return [
        {"job_id": ident, "seq": seq, "type": kind, "data": {}} for seq, kind in enumerate(types, start=1)
    ]


def got(tick: int, path: str, answer: Any, status: int = 200, client: str = "a", **members: Any) -> Seen:
    """A request that takes the tick and the one after it."""
    return Seen(client, tick, tick + 1, float(tick), "GET", path, status=status, got=answer, **members)


def submitted(tick: int, ident: str, key: str = "k", label: str | None = None) -> Seen:
    sent = {"labels": {"request": label or ident}}
    return Seen(
        "a", tick, tick + 1, 0.0, "POST", "/v1/jobs", key=key, sent=sent, status=202,
        got={"id": ident, "state": "queued"},
    )  # fmt: skip


def scores_page(tick: int, *items: Mapping[str, Any], more: str | None = None, **members: Any) -> Seen:
    return got(tick, "/v1/jobs/job_1/scores", {"items": list(items), "next_cursor": more}, **members)


def job_seen(tick: int, state: str, client: str = "a") -> Seen:
    return got(tick, "/v1/jobs/job_1", {"id": "job_1", "state": state}, client=client)


def sound() -> tuple[list[Seen], Final]:
    """A history as it should be: a submission of unknown outcome and its repetition, then looks."""
    unknown = replace(submitted(1, "job_1"), status=None, got=None, error="ReadError")
    events = story("job_1", "queued", "running", "queued", "running", "stage", "succeeded")
    told = [{"seq": event["seq"], "type": event["type"], "data": {}} for event in events]
    plan = {"id": "plan_1", "status": "optimal", "document": {"layers": {"fc": "w4"}}}
    history = [
        unknown,
        submitted(3, "job_1"),
        job_seen(5, "queued"),
        scores_page(7, SCORE),
        job_seen(9, "running"),
        scores_page(11, SCORE, more="c"),
        scores_page(13, OTHER, query={"cursor": "c"}),
        got(15, "/v1/jobs/job_1/events", {"items": told, "next_cursor": None}),
        job_seen(17, "succeeded", client="b"),
        got(19, "/v1/jobs/job_1/plans", {"items": [plan], "next_cursor": None}),
        got(21, "/v1/jobs", {"items": [{"id": "job_1", "state": "succeeded"}], "next_cursor": None}),
        got(23, "/v1/jobs/job_1", None, status=304),
    ]
    final = Final(
        jobs=[job()],
        events=events,
        scores=[{"score_set": "set", **row} for row in (SCORE, OTHER)],
        units=[{"score_set": "set", "key": "score:fc", "artifact": DIGEST}],
        plans=[{**plan, "job_id": "job_1", "budget": "3 bpw", "settings_digest": "s"}],
        webhooks=[{"job_id": "job_1", "state": "delivered", "attempts": 2}],
        blobs=[{"tenant": "default", "sha256": DIGEST}],
        files={DIGEST: DIGEST},
        again=[("plan_1", {"fc": "w4"}, {"fc": "w4"})],
        expected={"fc|w4|output_kl": [0.25, 0.01, 8]},
        told=[["job_1", "job.succeeded"], ["job_1", "job.succeeded"]],
    )
    return history, final


def seen(*more: Seen) -> Break:
    """Somebody saw this, too."""
    return lambda history, final: ([*history, *more], final)


def left(**changes: Any) -> Break:
    """The end was another one."""
    return lambda history, final: (history, replace(final, **changes))


def both(*breaks: Break) -> Break:
    def apply(history: list[Seen], final: Final) -> tuple[list[Seen], Final]:
        for change in breaks:
            history, final = change(history, final)
        return history, final

    return apply


EVENTS = list(sound()[1].events)
FAILED = [*EVENTS[:5], {**EVENTS[5], "type": "failed"}]
PLAN = dict(sound()[1].plans[0])
BROKEN: list[tuple[str, Break]] = [
    ("answers", seen(got(30, "/v1/jobs/job_1", {"detail": "boom"}, status=500))),
    ("answers", seen(got(30, "/v1/jobs/job_1", {"detail": "no such job"}, status=404))),
    ("lost jobs", seen(replace(submitted(30, "job_2"), sent=None))),
    ("requests done twice", seen(submitted(30, "job_1", key="other", label="gone"))),
    (
        "requests done twice",
        left(
            jobs=[job(), job("job_2", request=job()["request"])],
            events=EVENTS + [{**event, "job_id": "job_2"} for event in EVENTS],
        ),
    ),
    (
        "requests done twice",
        both(
            seen(replace(submitted(30, "job_2", key="k"), sent=None)),
            left(
                jobs=[job(), job("job_2")], events=EVENTS + [{**event, "job_id": "job_2"} for event in EVENTS]
            ),
        ),
    ),
    ("lost scores", left(scores=[{"score_set": "set", **OTHER}])),
    ("lost scores", seen(scores_page(30, {**SCORE, "value": 0.5}, OTHER))),
    ("lost scores", seen(scores_page(30, SCORE, {**OTHER, "samples": 4}))),
    ("scores that vanish", seen(scores_page(30, OTHER))),
    ("scores that vanish", seen(scores_page(30, query={"cursor": "c"}))),
    ("scores that vanish", seen(scores_page(30, OTHER, more="d"))),
    ("duplicates", left(scores=[{"score_set": "set", **row} for row in (SCORE, OTHER, OTHER)])),
    ("duplicates", left(units=[{"score_set": "set", "key": "score:fc", "artifact": DIGEST}] * 2)),
    ("duplicates", left(plans=[PLAN, {**PLAN, "id": "plan_2"}])),
    ("duplicates", seen(scores_page(30, SCORE, SCORE, OTHER))),
    ("terminal events", left(events=[*EVENTS[:5], {**EVENTS[5], "type": "stage"}])),
    ("terminal events", left(events=[*EVENTS, {**EVENTS[5], "seq": 7}])),
    ("moves", left(events=[*EVENTS[:1], {**EVENTS[1], "type": "stage"}, *EVENTS[2:]])),
    ("moves", left(events=[{**EVENTS[0], "type": "stage"}, *EVENTS[1:]])),
    ("moves", seen(job_seen(30, "running"))),
    ("moves", seen(job_seen(16, "failed", client="c"))),
    ("event numbers", left(events=[*EVENTS[:4], {**EVENTS[4], "seq": 7}, {**EVENTS[5], "seq": 8}])),
    ("event numbers", seen(got(30, "/v1/jobs/job_1/events", {"items": [{**EVENTS[0], "type": "stage"}]}))),
    ("event numbers", seen(got(30, "/v1/jobs/job_1/events", {"items": [EVENTS[0], EVENTS[2]]}))),
    ("event numbers", seen(got(30, "/v1/jobs/job_1/events", {"items": [{**EVENTS[5], "seq": 7}]}))),
    ("plans", left(plans=[])),
    ("plans", left(plans=[{**PLAN, "document": {"layers": {"fc": "w8"}}}])),
    ("reproducible", left(again=[("plan_1", {"fc": "w4"}, {"fc": "w8"})])),
    ("undisturbed", left(expected={"fc|w8|output_kl": [0.5, 0.01, 8]})),
    ("faults", left(faults=[{"unit_key": "score:fc", "kept": {}, "got": {}}])),
    ("leases", left(jobs=[job(lease_owner="somebody")])),
    ("leases", left(jobs=[job(lease_expires_at=3.0)])),
    ("webhooks", left(webhooks=[{"job_id": "job_1", "state": "pending", "attempts": 1}])),
    ("webhooks", left(told=[])),
    ("webhooks", left(told=[["job_1", "job.succeeded"], ["job_1", "job.failed"]])),
    ("files", left(files={DIGEST: "e" * 64})),
    ("files", left(files={})),
    ("strays", left(strays=["17: python -m service.executors.confine"])),
]
ENDS: list[tuple[str, Break]] = [
    ("failed", left(jobs=[job(state="failed", problem=PROBLEM)], events=FAILED)),
    ("cancelled", left(jobs=[job(state="cancelled")])),
    ("never ended", left(jobs=[job(state="running")])),
]


def test_a_sound_history_is_found_sound():
    assert check(*sound()) == {}


@pytest.mark.parametrize(
    ("name", "change"), BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_broken_history_is_found_by_its_check(name, change):
    found = check(*change(*sound()))
    assert name in found, found


@pytest.mark.parametrize(("said", "change"), ENDS, ids=[name for name, _ in ENDS])
def test_a_wrong_end_is_found(said, change):
    found = check(*change(*sound()))
    assert said in found["ends"][0]


def test_every_check_is_tried():
    assert {name for name, _ in BROKEN} | {"ends"} == set(CHECKS)


def test_a_job_that_was_cancelled_may_end_so():
    cancel = Seen("a", 8, 9, 0.0, "POST", "/v1/jobs/job_1/cancel", error="ReadError")
    events = story("job_1", "queued", "running", "cancelling", "cancelled")
    final = Final(jobs=[job(state="cancelled")], events=events)
    assert "ends" in check([submitted(1, "job_1")], final)
    assert check([submitted(1, "job_1"), cancel], final) == {}


def test_a_job_may_fail_of_too_many_deaths_but_not_of_fewer():
    events = story("job_1", "queued", "running", "failed")
    failed = [job(state="failed", problem=PROBLEM)]
    deaths = {"job_id": "job_1", "unit_key": "score:fc"}
    final = Final(jobs=failed, events=events, attempts=[{**deaths, "attempts": 3}])
    assert check([], final) == {}
    assert "ends" in check([], replace(final, attempts=[{**deaths, "attempts": 2}]))
    lost = [{"job_id": "job_1", "seq": seq, "type": "reclaimed", "data": {}} for seq in range(3, 8)]
    story_of_loss = [*events[:2], *lost, {**events[2], "seq": 8}]
    died = [job(state="failed", problem={"type": "urn:bitplan:problem:runner-died"})]
    assert check([], Final(jobs=died, events=story_of_loss)) == {}
    assert "ends" in check([], Final(jobs=died, events=events))


def test_overlapping_requests_may_see_either_side_of_a_change():
    history, final = sound()
    overlapping = replace(job_seen(16, "running", client="c"), ended=40)
    late = replace(scores_page(6, client="c"), ended=40)
    assert check([*history, overlapping, late], final) == {}


def test_reachable_states_follow_the_table():
    assert REACHABLE["queued"] == {
        "queued",
        "running",
        "cancelling",
        "succeeded",
        "failed",
        "cancelled",
        "expired",
    }
    assert REACHABLE["cancelling"] == {"cancelling", "cancelled"}
    assert REACHABLE["succeeded"] == {"succeeded"}


def test_a_stored_run_is_judged_alike(tmp_path, capsys):
    history, final = sound()
    kept = History()
    for one in history:
        kept.add(one)
    kept.save(tmp_path / "history.jsonl")
    final.save(tmp_path / "final.json")
    assert load_history(tmp_path / "history.jsonl") == history
    assert check(load_history(tmp_path / "history.jsonl"), load_final(tmp_path / "final.json")) == {}
    assert main(tmp_path) == 0
    replace(final, faults=[{"unit_key": "score:fc", "kept": {}, "got": {}}]).save(tmp_path / "final.json")
    assert main(tmp_path) == 1
    assert "score:fc" in capsys.readouterr().out
