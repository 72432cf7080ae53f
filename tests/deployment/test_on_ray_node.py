"""docker/on-ray-node: node and command start together, and end together, the command first and in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deployment.rules import ROOT

SCRIPT = ROOT / "docker" / "on-ray-node"
PATIENCE_SECONDS = 60
NODE = """#!/bin/bash
echo "node starts: $*" >> "$STORY"
trap 'echo "node ends" >> "$STORY"; exit 0' TERM
while [ ! -e "$STORY.node" ]; do sleep 0.05; done
exit 3
"""
COMMAND = """#!/bin/bash
echo "command starts: $*" >> "$STORY"
trap 'sleep 0.3; echo "command ends" >> "$STORY"; exit 0' TERM
while [ ! -e "$STORY.command" ]; do sleep 0.05; done
exit 5
"""
Begin = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return tmp_path / "story"


@pytest.fixture
def begin(tmp_path: Path, story: Path) -> Iterator[Begin]:
    for name, body in (("ray", NODE), ("bitplan", COMMAND)):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STORY": str(story)}
    started = []

    def run() -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [SCRIPT, "head:6379", "bitplan", "runner"], env=environment, start_new_session=True
            )
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(lines(story)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return started[-1]

    yield run
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def lines(story: Path) -> list[str]:
    return story.read_text().splitlines() if story.exists() else []


def test_a_signal_ends_the_command_before_its_node(begin: Begin, story: Path) -> None:
    process = begin()
    assert sorted(lines(story)) == [
        "command starts: runner",
        "node starts: start --address=head:6379 --num-cpus=0 --disable-usage-stats --block",
    ]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert lines(story)[2:] == ["command ends", "node ends"]


def test_a_command_that_ends_takes_its_node_along_and_gives_its_code(begin: Begin, story: Path) -> None:
    process = begin()
    Path(f"{story}.command").touch()
    assert process.wait(PATIENCE_SECONDS) == 5
    assert lines(story)[2:] == ["node ends"]


def test_a_node_that_dies_ends_the_command_so_that_both_are_started_again(begin: Begin, story: Path) -> None:
    process = begin()
    Path(f"{story}.node").touch()
    process.wait(PATIENCE_SECONDS)
    assert lines(story)[2:] == ["command ends"]
