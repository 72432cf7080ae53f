"""Environments of their own for tools that must not come near Bitplan's, and scripts that run in them.

    python = environment("curvlinops", "curvlinops-for-pytorch", "numpy")
    run_script(python, Path("benchmarks/trace_peers.py"), "curvlinops", folder)

Each lies in the user's cache and is made on first use, with torch as constraints.txt pins it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent / "constraints.txt"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
BESIDE_PATHS = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
LAST_LINES = 3


class PeerFailed(RuntimeError):  # noqa: N818 - what happened
    """A tool could not be installed or did not finish; the message is the end of what it said."""


def cache_folder() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitplan-benchmarks"


def environment(name: str, *packages: str, folder: Path | None = None) -> Path:
    """The interpreter of a virtual environment with the packages and the pinned torch.

    Raises PeerFailed with pip's last words.
    """
    place = (folder or cache_folder()) / name
    python, finished = place / "bin" / "python", place / "finished"
    wanted = "\n".join(sorted(packages))
    if not finished.exists() or finished.read_text() != wanted:
        start = time.perf_counter()
        _run([sys.executable, "-m", "venv", "--clear", place], dict(os.environ))
        _run([python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, "torch", *packages], dict(os.environ))
        finished.write_text(wanted)
        print(f"made an environment for {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return python


def run_script(python: Path, script: Path, *arguments: object) -> None:
    """Run a script on one thread, without network, with this folder on its path. Raises PeerFailed."""
    _run([python, script, *arguments], {**os.environ, **ONE_THREAD, **OFFLINE, **BESIDE_PATHS})


def _run(command: list[object], variables: dict[str, str]) -> None:
    words = list(map(str, command))
    done = subprocess.run(words, check=False, env=variables, capture_output=True, text=True)  # noqa: S603 - a command of ours
    if done.returncode:
        raise PeerFailed(last_words(done.stderr) or f"exit status {done.returncode}")


def last_words(text: str) -> str:
    """The last lines of an error stream that say something, as one line.

    >>> last_words("Traceback\\n  File x\\n\\nValueError: no\\n")
    'Traceback / File x / ValueError: no'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])
