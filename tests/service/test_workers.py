"""The same seed gives the same numbers, on one worker process or three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.db.repositories import scores, units
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.settings import Settings
from service.wire import CorrelationJob

METRICS = ["output_kl", "sqnr", "fisher", "gram_fisher", "hessian_trace", "linearity", "layer_output_error"]


def measured(folder: Path, model: Any, workers: int) -> tuple[Any, ...]:
    """Scores, arrays of units and correlations that so many worker processes came to."""
    url = f"sqlite:///{folder}/bitplan.db"
    settings = Settings(data_dir=folder, database_url=url, executor="local_pool", workers=workers)
    with Local(settings) as local:
        request = local.request(
            local.model(folder_source(model.folder)),
            local.calibration(file_data(model.data)),
            {
                "budgets": ["4 bpw"],
                "schemes": ["w2", "w4", "w8"],
                "metrics": METRICS,
                "samples": 8,
                "batch_size": 3,
                "max_probes": 16,
                "seed": 11,
            },
        )
        job = local.correlate(CorrelationJob(search=request, plans=8))
        assert job.state == "succeeded", job.problem
        with local.database.read() as session:
            rows = scores.list_all(session, str(job.score_set))
            kinds = ("score", "block", "combined", "measure")
            found = [unit for kind in kinds for unit in units.list_kind(session, str(job.score_set), kind)]
    summary = dict(job.summary or {})
    for one in summary["scores"]:
        del one["forwards"]  # every worker has passes of its own that others need not repeat
    return rows, [(unit.key, unit.artifact) for unit in found], summary


@pytest.mark.slow  # four worker processes
def test_one_worker_and_three_come_to_the_same_numbers(tiny: Any, tmp_path: Path) -> None:
    model = tiny("resnet")
    assert measured(tmp_path / "one", model, 1) == measured(tmp_path / "three", model, 3)
