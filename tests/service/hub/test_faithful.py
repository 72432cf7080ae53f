"""The hub of these tests is like the real one as far as the hub's own client can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.hub_server import COMMIT, REPOSITORY, Hub, sha256

PROGRAM = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download
repository, commit, folder = sys.argv[1:]
info = HfApi().model_info(repository, revision=commit, files_metadata=True)
names = ("config.json", "model.safetensors", "tokenizer.json")
paths = {name: hf_hub_download(repository, name, revision=commit, cache_dir=folder) for name in names}
print(json.dumps({
    "sha": info.sha,
    "files": {file.rfilename: [file.size, file.blob_id, file.lfs and file.lfs.sha256] for file in info.siblings},
    "paths": paths,
}))
"""


@pytest.mark.slow
def test_the_hubs_own_client_takes_it_for_a_hub(hub: Hub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = 1000
    variables = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", PROGRAM, REPOSITORY, COMMIT, str(tmp_path / "cache")]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    large = sha256(hub.files["model.safetensors"])
    assert told["sha"] == COMMIT
    assert told["files"]["model.safetensors"][0] == len(hub.files["model.safetensors"])
    assert told["files"]["model.safetensors"][2] == large
    assert told["files"]["config.json"][2] is None
    for name, path in told["paths"].items():
        assert Path(path).read_bytes() == hub.files[name]
    assert Path(told["paths"]["model.safetensors"]).resolve().name == large, (
        "the client named it after X-Linked-Etag"
    )
