"""Three trained seeds of both demo models: the promise of the demo does not hang on one lucky seed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.train_demo_models import train_cnn, train_lm

ROOT = Path(__file__).parents[2]
DEMOS = {
    "digits-resnet": (train_cnn, ["--samples", "256"]),
    "topics-llama": (train_lm, ["--samples", "48", "--sequence-length", "128"]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", DEMOS)
def test_every_seed_beats_uniform(tmp_path, name, seed):
    train, options = DEMOS[name]
    trained = train(tmp_path, seed)
    command = [
        sys.executable, "-m", "service.cli.main", "run", str(trained.folder), "-c", str(trained.calibration),
        "-b", "2.5 bpw", "-b", "3.5 bpw", "-b", "uniform w4-asym-gptq", *options, "--seed", str(seed),
        "--data-dir", str(tmp_path / "data"), "--json",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for plan in json.loads(ended.stdout):
        assert plan["evidence"]["verdict"]["beats_all_uniform"], plan["budget"]
