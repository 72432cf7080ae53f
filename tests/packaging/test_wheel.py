"""The wheel holds everything that a service needs: built for real, used from outside the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import sys
from pathlib import Path
import service
from quant.plan import plan_schema
from service.db import migrate

assert Path(service.__file__).is_relative_to(Path.cwd()), service.__file__
assert migrate.migrations_folder().is_relative_to(Path.cwd())
migrate.upgrade("sqlite:///used.db")
assert migrate.current("sqlite:///used.db") == migrate.newest()
print(plan_schema()["$id"])
"""


@pytest.mark.slow
def test_the_wheel_brings_migrations_schema_and_types(tmp_path):
    built = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("bitplan-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"{package}/py.typed" for package in ("quant", "sensitivity", "search", "service")} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))]
    ended = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path / "site",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "plan" in ended.stdout
