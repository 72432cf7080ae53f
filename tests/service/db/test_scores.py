from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from service.db.engine import Database
from service.db.repositories import attempts, jobs, score_sets, scores, units
from service.records import ScoreRecord
from service.states import JobKind

SET = "a" * 64


@pytest.fixture(autouse=True)
def score_set(database: Database) -> None:
    with database.write() as session:
        score_sets.ensure(session, SET, {"seed": 0})


def record(layer: str = "a", scheme: str = "w4", metric: str = "kl", value: float = 0.1) -> ScoreRecord:
    return ScoreRecord(SET, layer, scheme, metric, value, 0.01, 8, f"score:{layer}:{scheme}")


def insert(database: Database, *records: ScoreRecord) -> tuple[ScoreRecord, ...]:
    with database.write() as session:
        return scores.insert(session, records)


def test_a_score_set_is_made_once(database: Database) -> None:
    with database.write() as session:
        again = score_sets.ensure(session, SET, {"seed": 1})
        assert again.settings == {"seed": 0}
        assert score_sets.get(session, "b" * 64) is None
        assert score_sets.get(session, SET, tenant="other") is None


def test_scores_come_back_exactly(database: Database) -> None:
    numbers = [0.1 + 0.2, 1e-300, -5e-324, 1.7976931348623157e308, 3.0]
    rows = [record(f"l{index}", value=number) for index, number in enumerate(numbers)]
    rows.append(replace(record("none"), stderr=None, samples=2**40))
    assert insert(database, *rows) == ()
    with database.read() as session:
        assert scores.list_all(session, SET) == tuple(rows)


def test_the_same_score_twice_is_one_row_and_no_disagreement(database: Database) -> None:
    assert insert(database, record()) == ()
    assert insert(database, record(), record("b")) == ()
    with database.read() as session:
        assert len(scores.list_all(session, SET)) == 2


@pytest.mark.parametrize("change", [{"value": 0.2}, {"stderr": None}, {"samples": 9}])
def test_another_value_disagrees_and_changes_nothing(database: Database, change: dict[str, float]) -> None:
    insert(database, record())
    other = replace(record(), **change)
    assert insert(database, other) == (other,)
    with database.read() as session:
        assert scores.get(session, SET, "a", "w4", "kl") == record()


def test_scores_need_their_set(database: Database) -> None:
    with pytest.raises(IntegrityError):
        insert(database, replace(record(), score_set="b" * 64))


def test_keys_filters_and_pages(database: Database) -> None:
    rows = [
        record(layer, scheme, metric)
        for layer in "aBc"
        for scheme in ("w2", "w4")
        for metric in ("kl", "mse")
    ]
    insert(database, *reversed(rows))
    ordered = tuple(sorted(rows, key=lambda row: (row.layer, row.scheme, row.metric)))
    assert ordered[0].layer == "B"
    with database.read() as session:
        assert scores.keys(session, SET) == {(row.layer, row.scheme, row.metric) for row in rows}
        assert scores.list_all(session, SET, ["mse"]) == tuple(row for row in ordered if row.metric == "mse")
        seen: list[ScoreRecord] = []
        after: scores.ScoreKey | None = None
        while page := scores.list_page(session, SET, 5, after):
            seen += page
            after = (page[-1].layer, page[-1].scheme, page[-1].metric)
    assert tuple(seen) == ordered


def test_units_are_stored_once(database: Database) -> None:
    unit = {"unit": "block", "metric": "fisher"}
    with database.write() as session:
        for facts, artifact, new in (({"n": 1}, "aa", True), ({"n": 2}, "bb", False)):
            stored = units.insert(
                session,
                score_set=SET,
                key="k",
                kind="block",
                unit=unit,
                facts=facts,
                artifact=artifact,
                job_id="job_1",
            )
            assert stored is new
        kept = units.get(session, SET, "k")
        assert kept is not None
        assert (kept.facts, kept.artifact, kept.unit) == ({"n": 1}, "aa", unit)
        assert units.keys(session, SET) == {"k"}
        assert units.list_kind(session, SET, "block") == (kept,)
        assert units.get(session, SET, "other") is None


def test_many_units_are_read_by_their_keys(database: Database) -> None:
    keys = [f"k{number:04}" for number in range(2 * units.CHUNK)]
    with database.write() as session:
        for key in keys[1:]:
            units.insert(
                session,
                score_set=SET,
                key=key,
                kind="score",
                unit={"unit": "score"},
                facts={},
                artifact=None,
                job_id=None,
            )
        found = units.get_many(session, SET, [*keys, *keys[:3], "other"])
        assert set(found) == set(keys[1:])
        assert found["k0007"] == units.get(session, SET, "k0007")
        assert units.get_many(session, SET, []) == {}


def test_faults_are_kept(database: Database) -> None:
    with database.write() as session:
        fault = units.add_fault(session, score_set=SET, unit_key="k", kept={"v": 1}, got={"v": 2})
        assert units.faults(session, SET) == (fault,)


def test_attempts_are_counted_per_job(database: Database) -> None:
    with database.write() as session:
        one = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
        two = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
        counts = [attempts.add(session, one.id, "k", {"n": n}).attempts for n in range(3)]
        assert counts == [1, 2, 3]
        assert attempts.add(session, two.id, "k", {}).attempts == 1
        (record,) = attempts.list_job(session, one.id)
        assert (record.attempts, record.last_failure) == (3, {"n": 2})
