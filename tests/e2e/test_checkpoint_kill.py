"""kill -9 of runner and worker while a checkpoint is written: it is written again, whole, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.db.repositories import events
from service.states import TERMINAL

PLACES = (
    "runner.after_claim",
    "worker.before_unit",
    "worker.after_unit",
    "runner.checkpoint_stored",
    "runner.before_finish",
)
JOB_SECONDS = 120


def written(plan, folder: Path):
    """The job that wrote the plan's checkpoint, and the files that were downloaded."""
    job = plan.write_checkpoint("pytorch").wait(timeout=JOB_SECONDS)
    plan.save_checkpoint("pytorch", folder)
    return job, {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_survives_kills(start, resnet, tmp_path):
    service = start().supervise()
    client = service.client()
    options = {"schemes": "w2,w4", "samples": 8, "batch_size": 4, "evaluations": 1}
    plan = client.submit(resnet.folder, resnet.calibration, ["3 bpw"], **options).wait().plan("3 bpw")
    (service.folder / "data" / "tmp" / "checkpoint-job_gone-1").mkdir(parents=True)
    job, undisturbed = written(plan, tmp_path / "undisturbed")
    for place in PLACES:
        assert client.transport.send("DELETE", f"/v1/jobs/{job.id}").status_code == 204
        once = tmp_path / place
        once.mkdir()
        service.variables = {
            "BITPLAN_FAILPOINTS": f"{place}=kill",
            "BITPLAN_FAILPOINTS_ONCE": str(once),
        }
        service.kill("runner")
        job, found = written(plan, tmp_path / f"after {place}")
        assert found == undisturbed, place
        assert [marker.name for marker in once.iterdir()] == [f"{place}.1.kill"]
        with service.database() as database, database.read() as session:
            story = [event.type for event in events.list_after(session, job.id)]
        assert [kind for kind in story if kind in TERMINAL] == ["succeeded"]
        assert list((service.folder / "data" / "tmp").glob("checkpoint-*")) == []
        blobs = [path.name for path in (service.folder / "data" / "blobs").rglob("*") if path.is_file()]
        assert blobs.count(job.resource["summary"]["sha256"]) == 1
