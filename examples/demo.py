"""Run the main job twice on real input: start the service, send two models over HTTP, show what comes back.

`make demo` runs this. Everything it writes goes to `.demo/`; the tables are made of the jobs' own JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from examples.train_demo_models import THREADS, train_cnn, train_lm
from service.cli.output import JobProgress, plans_table
from service.cli.output import console as tall_console
from service.client import Client, JobHandle

BUDGETS = ("2.5 bpw", "3.5 bpw", "uniform w4-asym-gptq")
START_SECONDS = 60


@dataclass(frozen=True)
class Demo:
    """One model of the demo: its folder, its calibration file and how much of that is used."""

    title: str
    folder: Path
    calibration: Path
    samples: int
    sequence_length: int


def main() -> None:
    """Train, serve, submit, watch, download, apply, show."""
    options = _options()
    console = tall_console()
    demos = _train(options.out, options.seed, console)
    with _service(options.out, console) as (url, log):
        client = Client(url)
        for demo in demos:
            _run(client, demo, options.out / "plans", console)
        console.print(f"\nPlans and checkpoints: {options.out / 'plans'}   service log: {log}")
        console.print(
            f"API docs: run `.venv/bin/bitplan serve --data-dir {options.out / 'data'}` and open http://127.0.0.1:8000/docs"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _train(out: Path, seed: int, console: Console) -> tuple[Demo, ...]:
    models = out / "models"
    if not (models / ".trained").exists():
        console.print("Training two small models on real data (about a minute): digits, and Python's manual.")
        torch.set_num_threads(THREADS)
        disable_progress_bar()
        for train in (train_cnn, train_lm):
            trained = train(models, seed)
            console.print(f"  {trained.folder.name}: {trained.metric} {trained.value:.4g}")
        (models / ".trained").touch()
    cnn, lm = models / "digits-resnet", models / "topics-llama"
    return (
        Demo("Image classifier (ResNet, digits)", cnn, cnn / "calibration.safetensors", 256, 2),
        Demo("Language model (Llama, English text)", lm, lm / "calibration.jsonl", 48, 128),
    )


@contextmanager
def _service(out: Path, console: Console) -> Iterator[tuple[str, Path]]:
    """`bitplan serve` on a free port of this machine, stopped with Ctrl-C's signal at the end."""
    out.mkdir(parents=True, exist_ok=True)
    port, log = _free_port(), out / "service.log"
    command = [
        sys.executable,
        "-m",
        "service.cli.main",
        "serve",
        "--port",
        str(port),
        "--data-dir",
        str(out / "data"),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            console.print(f"Service: {url} (API and runner, SQLite)")
            yield url, log
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    client, deadline = Client(url), time.monotonic() + START_SECONDS
    while not client.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"The service must answer within {START_SECONDS} s. Read {log}.")
        time.sleep(0.2)


def _run(client: Client, demo: Demo, out: Path, console: Console) -> None:
    started = time.monotonic()
    job = client.submit(
        model=demo.folder,
        calibration=demo.calibration,
        budgets=BUDGETS,
        samples=demo.samples,
        sequence_length=demo.sequence_length,
    )
    console.print(f"\n{demo.title}: sent, {job.id}")
    with JobProgress() as bar:
        job.wait(on_progress=bar)
    _download(job, demo, out)
    plans = [job.plan(budget).resource for budget in BUDGETS]
    (out / f"{demo.folder.name}.json").write_text(json.dumps(plans, indent=2), encoding="utf-8")
    console.print(plans_table(demo.title, plans))
    console.print(f"measured, solved and proven in {time.monotonic() - started:.0f} s")


def _download(job: JobHandle, demo: Demo, out: Path) -> None:
    """Save every plan and the checkpoint it gives; those of an earlier run are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    for budget in BUDGETS:
        stem = f"{demo.folder.name}-{budget.replace(' ', '-')}"
        file = out / f"{stem}.plan.json"
        job.plan(budget).save(file)
        shutil.rmtree(out / stem, ignore_errors=True)
        command = [sys.executable, "-m", "service.cli.main", "apply", demo.folder, file, "-o", out / stem]
        command += ["--calibration", demo.calibration]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)  # noqa: S603 - our own command


if __name__ == "__main__":
    main()
