"""A runner process for tests: scores 12 units with fake sessions in two workers, until the job is finished.

Arguments: the calibration file where sessions leave notes. Settings come from the environment.
"""

import sys
from collections.abc import Mapping
from typing import Any

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import MeasureUnit, ScoreUnit
from service.db.engine import Database
from service.db.repositories import jobs, scores
from service.runner.context import JobContext
from service.runner.dispatch import run_units
from service.runner.loop import Runner
from service.settings import Settings
from service.states import JobKind, JobState, Stage

SET = "a" * 64
UNITS = [ScoreUnit(f"l{index}", "w4", ("output_kl", "gram_output")) for index in range(10)]
MEASURE = [MeasureUnit((), "choosing"), MeasureUnit((("l0", "w4"),), "choosing")]


def handler(context: JobContext) -> Mapping[str, Any]:
    spec = SessionSpec(ModelSource("folder", "fine", "aa"), DataSource(sys.argv[1], "text", "bb"))
    context.open_score_set(SET, {"seed": 0})
    executor = context.executor(spec)
    try:
        run_units(context, executor, SET, UNITS, Stage.SCORING)
        run_units(context, executor, SET, MEASURE, Stage.MEASURING)
    finally:
        executor.close(0)
    stored = context.read(lambda session: scores.list_all(session, SET))
    return {"sum": sum(row.value for row in stored)}


def main() -> None:
    settings = Settings()
    database = Database(settings.database_url)
    runner = Runner(settings, database, {JobKind.SEARCH: handler})
    runner.take_back()
    while runner.run_one() is not None:
        pass
    with database.read() as session:
        assert jobs.list_page(session, state=JobState.QUEUED) == ()
    database.close()


if __name__ == "__main__":
    main()
