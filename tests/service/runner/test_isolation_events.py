from collections.abc import Callable
from pathlib import Path

from sensitivity.spec import SessionSpec
from service.db.engine import Database
from service.db.repositories import events
from service.executors.in_process import InProcess
from service.executors.protocol import Executor, ExecutorSettings
from service.runner.context import JobContext

GAPS = ("network not isolated: unshare: Operation not permitted",)


def test_what_workers_are_not_kept_from_is_an_event_once(
    new_context: Callable[..., JobContext], spec: SessionSpec, database: Database, tmp_path: Path
) -> None:
    made: list[ExecutorSettings] = []

    def make(settings: ExecutorSettings) -> Executor:
        made.append(settings)
        return InProcess(settings)

    context = new_context(make)
    context.executor(spec, writable=(tmp_path,))
    for _ in range(2):
        made[0].on_gaps(GAPS)
        context.tell_gaps()
    with database.read() as session:
        found = [one.data for one in events.list_after(session, context.job.id) if one.type == "isolation"]
    assert found == [{"gaps": list(GAPS)}]
    assert made[0].isolation.writable == (str(tmp_path.resolve()),)
    assert str(context.settings.data_dir) in made[0].isolation.closed
