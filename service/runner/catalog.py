"""HANDLERS: which function runs which kind of job. Named, not imported, so that listing them stays cheap."""

from collections.abc import Mapping
from typing import cast

from service.executors import sessions
from service.runner.loop import Handler
from service.states import JobKind

HANDLERS: Mapping[JobKind, str] = {
    JobKind.SEARCH: "service.runner.search_job:run_search",
    JobKind.VERIFY_MODEL: "service.runner.verify_job:run_verification",
    JobKind.MEASURE_PLAN: "service.runner.measure_job:run_measurement",
    JobKind.WRITE_CHECKPOINT: "service.runner.checkpoint_job:run_checkpoint",
    JobKind.MAKE_CALIBRATION: "service.runner.calibration_job:run_making",
    JobKind.CORRELATE: "service.runner.correlate_job:run_correlations",
}


def load_handlers() -> dict[JobKind, Handler]:
    """The handlers themselves."""
    return {kind: cast(Handler, sessions.load(path)) for kind, path in HANDLERS.items()}
