"""What must be true of every history: each check yields a sentence per violation.

`python -m tests.chaos.checker FOLDER` judges a stored run again.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.errors import slug_of
from service.runner.dispatch import DEATHS
from service.runner.loop import MOST_LOST
from service.states import TERMINAL, TRANSITIONS, JobState, WebhookState
from tests.chaos.final import Final, Row, load_final
from tests.chaos.history import Seen, accepted, load_history

Check = Callable[[Sequence[Seen], Final], Iterable[str]]
STATES = frozenset(JobState)
FINE = frozenset({304, 409, 416, 429, 503, 507})
"""Answers beside 2xx that a client may get while processes die: not changed, not now, somebody was faster."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "jobs": ("id",),
    "events": ("job_id", "seq"),
    "scores": ("score_set", "layer", "scheme", "metric"),
    "units": ("score_set", "key"),
    "plans": ("job_id", "budget", "settings_digest"),
    "webhooks": ("job_id",),
    "calibrations": ("digest",),
    "blobs": ("tenant", "sha256"),
}
"""Table -> what a row of it is known by: two rows with the same would be a duplicate."""


def reachable() -> dict[str, frozenset[str]]:
    """State -> the states that may be seen after it, itself among them."""
    found: dict[str, set[str]] = {str(state): {str(state)} for state in JobState}
    for _ in JobState:
        for state in JobState:
            found[state] |= {str(far) for near in TRANSITIONS[state] for far in found[near]}
    return {state: frozenset(states) for state, states in found.items()}


REACHABLE = reachable()


def answers(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """A server that lives answers what was asked, or says that it cannot now."""
    for one in history:
        if one.status is not None and not one.accepted and one.status not in FINE:
            yield f"{one.client} got {one.status} for {one.method} {one.path}: {one.got}"


def lost_jobs(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """What was accepted is there."""
    jobs = {job["id"] for job in final.jobs}
    for one in accepted(history, "POST"):
        ident = str((one.got or {}).get("id", ""))
        if ident.startswith("job_") and ident not in jobs:
            yield f"{ident} was accepted for {one.client} at tick {one.ended}, and is gone"


def requests_done_twice(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """One Idempotency-Key, one answer, one job, however often it was sent."""
    answered: dict[str, set[str]] = defaultdict(set)
    for one in accepted(history, "POST"):
        if one.key and isinstance(one.got, dict) and "id" in one.got:
            answered[one.key].add(str(one.got["id"]))
    for key, idents in answered.items():
        if len(idents) > 1:
            yield f"the Idempotency-Key {key} was answered with {sorted(idents)}"
    made = Counter(label for job in final.jobs if (label := submitted_as(job)) is not None)
    yield from (f"the request {label} became {count} jobs" for label, count in made.items() if count > 1)
    for one in accepted(history, "POST"):
        label = ((one.sent or {}).get("labels") or {}).get("request") if one.path == "/v1/jobs" else None
        if label is not None and made[label] != 1:
            yield f"the accepted request {label} became {made[label]} jobs"


def submitted_as(job: Row) -> str | None:
    """The label of the request that made the job; a resumed one has that of its predecessor."""
    labels = job["request"].get("labels") or {}
    return None if job["predecessor"] else labels.get("request")


def lost_scores(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """A score that somebody has seen stays, with the same numbers."""
    stored = {key_of("scores", row): numbers(row) for row in final.scores}
    sets = {job["id"]: job["score_set"] for job in final.jobs}
    for one in accepted(history, "GET", suffix="/scores"):
        for item in one.got["items"]:
            key = (sets.get(job_of(one)), *cell(item))
            if key not in stored:
                yield f"the score {key} was seen at tick {one.ended}, and is gone"
            elif stored[key] != numbers(item):
                yield f"the score {key} was seen as {numbers(item)}, and is {stored[key]}"


def scores_that_vanish(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Who asks later sees at least what was seen before, as far as the page reaches."""
    starts: dict[tuple[str, str], tuple[str, ...]] = {}
    pages: dict[str, list[tuple[Seen, frozenset[tuple[str, ...]]]]] = defaultdict(list)
    for one in sorted(accepted(history, "GET", suffix="/scores"), key=lambda seen: seen.ended):
        items = [cell(item) for item in one.got["items"]]
        more = one.got.get("next_cursor")
        if more:
            starts[job_of(one), more] = items[-1]
        start = starts.get((job_of(one), one.query["cursor"]), ("",)) if "cursor" in one.query else ("",)
        for earlier, found in pages[job_of(one)]:
            if earlier.before(one):
                due = {key for key in found if key > start and (not more or key <= items[-1])}
                yield from (
                    f"the score {key} of {job_of(one)} was seen at tick {earlier.ended} and not from tick "
                    f"{one.began} on"
                    for key in sorted(due - set(items))
                )
        pages[job_of(one)].append((one, frozenset(items)))


def duplicates(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """One row per key, in the database and on every page."""
    for table in KEYS:
        found = Counter(key_of(table, row) for row in getattr(final, table))
        yield from (f"{count} rows of {table} are {key}" for key, count in found.items() if count > 1)
    for one in accepted(history, "GET", suffix="/scores"):
        twice = [key for key, count in Counter(cell(item) for item in one.got["items"]).items() if count > 1]
        yield from (f"a page of the scores of {job_of(one)} holds {key} twice" for key in twice)


def terminal_events(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """A job that has ended has told so once, as its last state."""
    told: dict[str, list[str]] = defaultdict(list)
    for event in in_order(final.events):
        if event["type"] in TERMINAL:
            told[event["job_id"]].append(event["type"])
    for job in final.jobs:
        due = [job["state"]] if job["state"] in TERMINAL else []
        if told[job["id"]] != due:
            yield f"{job['id']} is {job['state']}, and its terminal events are {told[job['id']]}"


def moves(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """States move along the legal transitions, in the events and before everybody's eyes."""
    paths: dict[str, list[str]] = defaultdict(list)
    for event in in_order(final.events):
        if event["type"] in STATES:
            paths[event["job_id"]].append(event["type"])
    for job in final.jobs:
        path = paths[job["id"]]
        if path[:1] != [JobState.QUEUED] or path[-1:] != [job["state"]]:
            yield f"{job['id']} is {job['state']}, and its events go {' -> '.join(path) or 'nowhere'}"
        for old, new in pairwise(path):
            if new not in TRANSITIONS[JobState(old)]:
                yield f"{job['id']} went from {old} to {new}"
    for ident, seen in states_seen(history).items():
        yield from _out_of_order(ident, seen)
    ends = {job["id"]: job["state"] for job in final.jobs}
    for ident, seen in states_seen(history).items():
        for one, state in seen:
            if ends.get(ident, state) not in REACHABLE[state]:
                yield f"{ident} was seen {state} at tick {one.ended}, and is {ends[ident]}"


def states_seen(history: Sequence[Seen]) -> dict[str, list[tuple[Seen, str]]]:
    """Job -> every sight of its state, by the end of the request."""
    found: dict[str, list[tuple[Seen, str]]] = defaultdict(list)
    for one in sorted(history, key=lambda seen: seen.ended):
        if one.accepted and isinstance(one.got, dict):
            items = one.got["items"] if one.path == "/v1/jobs" and one.method == "GET" else [one.got]
            for item in items:
                if str(item.get("id", "")).startswith("job_") and not replayed(one):
                    found[item["id"]].append((one, item["state"]))
    return found


def replayed(one: Seen) -> bool:
    """An answer to a repeated POST tells of the time of the first one."""
    return one.method == "POST" and one.key is not None


def _out_of_order(ident: str, seen: Sequence[tuple[Seen, str]]) -> Iterator[str]:
    for position, (one, state) in enumerate(seen):
        for other, earlier in seen[:position]:
            if other.before(one) and state not in REACHABLE[earlier]:
                yield (
                    f"{ident} was seen {earlier} at tick {other.ended} by {other.client}, then {state} at tick "
                    f"{one.ended} by {one.client}"
                )


def event_numbers(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Numbers count from 1 without gaps, and what was told under a number stays."""
    stored: dict[str, dict[int, Row]] = defaultdict(dict)
    for event in in_order(final.events):
        stored[event["job_id"]][event["seq"]] = event
    for ident, events in stored.items():
        if list(events) != list(range(1, len(events) + 1)):
            yield f"the events of {ident} have the numbers {list(events)}"
    for one in accepted(history, "GET", suffix="/events"):
        told = one.got["items"] if one.got else []
        numbered = [item["seq"] for item in told]
        if numbered != list(range(numbered[0], numbered[0] + len(numbered)) if numbered else []):
            yield f"{one.client} was told the events {numbered} of {job_of(one)}"
        for item in told:
            kept = stored[job_of(one)].get(item["seq"])
            if kept is None or (kept["type"], kept["data"]) != (item["type"], item["data"]):
                yield f"event {item['seq']} of {job_of(one)} was told as {item['type']}, and is {kept}"


def plans(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """A plan that was shown stays as it was; evidence may come later."""
    stored = {plan["id"]: plan for plan in final.plans}
    for one in accepted(history, "GET", suffix="/plans"):
        for item in one.got["items"]:
            kept = stored.get(item["id"])
            if kept is None:
                yield f"{item['id']} was shown at tick {one.ended}, and is gone"
            elif (kept["document"], kept["status"]) != (item["document"], item["status"]):
                yield f"{item['id']} was shown at tick {one.ended}, and has changed"


def reproducible(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """The same rows give the same plan."""
    for ident, layers, again in final.again:
        if layers != again:
            yield f"{ident} is not what its rows give when they are solved again"


def undisturbed(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Every score is what it is without any death."""
    for row in final.scores:
        due = final.expected.get("|".join(cell(row)))
        if due is not None and list(due) != list(numbers(row)):
            yield f"the score {key_of('scores', row)} is {numbers(row)}, undisturbed it is {due}"


def faults(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """No unit that was measured twice gave another number."""
    yield from (f"unit {row['unit_key']} gave {row['kept']} and then {row['got']}" for row in final.faults)


def ends(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Every job ends as it should: it succeeds unless somebody cancelled it or its deaths were too many."""
    asked = {
        one.path.split("/")[3] for one in history if one.method == "POST" and one.path.endswith("/cancel")
    }
    for job in final.jobs:
        state, ident = job["state"], job["id"]
        if state not in TERMINAL:
            yield f"{ident} never ended: it is {state}"
        elif state == JobState.CANCELLED and ident not in asked:
            yield f"{ident} was cancelled, and nobody asked for it"
        elif state == JobState.EXPIRED or (state == JobState.FAILED and not too_many_deaths(job, final)):
            yield f"{ident} is {state}: {job['problem']}"


def too_many_deaths(job: Row, final: Final) -> bool:
    """Whether a job failed as docs/durability.md says that it must."""
    slug = slug_of(job["problem"] or {})
    if slug == "worker-crash":
        return any(row["job_id"] == job["id"] and row["attempts"] >= DEATHS for row in final.attempts)
    return slug == "runner-died" and runners_lost(job["id"], final) >= MOST_LOST


def runners_lost(ident: str, final: Final) -> int:
    """How many runners the job has lost."""
    return sum(
        event["type"] == "reclaimed" or event["data"].get("reason") == "the runner died"
        for event in final.events
        if event["job_id"] == ident
    )


def leases(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Nobody holds anything any more."""
    for job in final.jobs:
        held = {name: job[name] for name in job if name.startswith("lease_") and job[name] is not None}
        if held:
            yield f"{job['id']} is {job['state']} and is still held: {held}"


def webhooks(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Whoever asked to be told of a job's end was told, at least once, and only how it ended."""
    ended = {job["id"]: f"job.{job['state']}" for job in final.jobs}
    told = {(ident, kind) for ident, kind in final.told}
    for hook in final.webhooks:
        ident = hook["job_id"]
        if hook["state"] != WebhookState.DELIVERED or (ident, ended[ident]) not in told:
            yield f"the webhook of {ident} is {hook['state']} after {hook['attempts']} attempts"
    for ident, kind in sorted(told):
        if ended.get(ident) != kind:
            yield f"the receiver was told {kind} of {ident}, which is {ended.get(ident)}"


def files(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """Every file that can be seen is whole, and every file that a row names can be seen."""
    for name, content in final.files.items():
        if name != content:
            yield f"the file {name} holds {content}"
    named = {unit["artifact"] for unit in final.units if unit["artifact"]}
    named |= {blob["sha256"] for blob in final.blobs}
    yield from (
        f"the file {name} is named by a row, and is not there" for name in sorted(named - set(final.files))
    )


def strays(history: Sequence[Seen], final: Final) -> Iterator[str]:
    """No process outlives the service."""
    yield from (f"a process was left behind: {process}" for process in final.strays)


CHECKS: Mapping[str, Check] = {
    "answers": answers,
    "lost jobs": lost_jobs,
    "requests done twice": requests_done_twice,
    "lost scores": lost_scores,
    "scores that vanish": scores_that_vanish,
    "duplicates": duplicates,
    "terminal events": terminal_events,
    "moves": moves,
    "event numbers": event_numbers,
    "plans": plans,
    "reproducible": reproducible,
    "undisturbed": undisturbed,
    "faults": faults,
    "ends": ends,
    "leases": leases,
    "webhooks": webhooks,
    "files": files,
    "strays": strays,
}
"""Every invariant, by the name that a violation is reported under."""


def check(history: Sequence[Seen], final: Final) -> dict[str, list[str]]:
    """Check -> its violations; empty where all is well."""
    found = {name: list(find(history, final)) for name, find in CHECKS.items()}
    return {name: said for name, said in found.items() if said}


def job_of(one: Seen) -> str:
    """/v1/jobs/JOB/scores -> JOB."""
    return one.path.split("/")[3]


def cell(row: Row) -> tuple[str, ...]:
    """What a score is of."""
    return (row["layer"], row["scheme"], row["metric"])


def numbers(row: Row) -> tuple[Any, ...]:
    """What a score says."""
    return (row["value"], row["stderr"], row["samples"])


def key_of(table: str, row: Row) -> tuple[Any, ...]:
    """What a row is known by."""
    return tuple(row[name] for name in KEYS[table])


def in_order(events: Iterable[Row]) -> list[Row]:
    """By job and number."""
    return sorted(events, key=lambda event: (event["job_id"], event["seq"]))


def main(folder: Path) -> int:
    """Print what is wrong with a stored run; 1 if anything is."""
    found = check(load_history(folder / "history.jsonl"), load_final(folder / "final.json"))
    for name, said in found.items():
        print(f"{name}: {len(said)}", *(f"  {line}" for line in said[:20]), sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
