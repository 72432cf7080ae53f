"""The Dockerfile: hadolint has nothing to say, and the image runs as nobody special, with what the service needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.deployment.rules import ROOT, command_fault

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = Path(sys.executable).with_name("hadolint")
STAGES = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)


def hadolint(text: str) -> str:
    done = subprocess.run(
        [HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    assert bool(done.stdout) == bool(done.returncode)
    return done.stdout


def test_the_linter_has_nothing_to_say() -> None:
    assert hadolint(TEXT) == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("USER 10001:10001\n", "USER root\n", "DL3002"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        (" --no-install-recommends", "", "DL3015"),
        ("uv==0.13.9", "uv", "DL3013"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        (":3.12-slim-trixie\n", "\n", "DL3006"),
        ('CMD ["bitplan", "serve", "--host", "0.0.0.0"]', "CMD bitplan serve", "DL3025"),
        ('"${extra}"; done', "${extra}; done", "SC2086"),
    ],
)
def test_the_linter_finds_what_is_broken(old: str, new: str, rule: str) -> None:
    assert old in TEXT
    assert rule in hadolint(TEXT.replace(old, new))


def test_the_last_stage_has_no_tools_that_build_and_is_not_root() -> None:
    last = STAGES[-1]
    assert not re.search(r"\b(gcc|g\+\+|build-essential|pip|uv|git|curl)\b", last)
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert last.index("USER ") > last.rindex("RUN ")
    assert "HEALTHCHECK" in last
    assert "/readyz" in last


def test_the_build_of_torch_is_the_cpu_one_unless_said_otherwise() -> None:
    assert re.search(r"^ARG TORCH_BACKEND=cpu$", TEXT, re.MULTILINE)
    assert '--torch-backend "${TORCH_BACKEND}" -c "${TORCH_CONSTRAINTS}"' in TEXT
    assert (ROOT / "constraints.txt").read_text().splitlines()[-1].startswith("torch==")


def test_its_extras_exist() -> None:
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', TEXT, re.MULTILINE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split()) <= set(known)


def test_its_commands_are_commands() -> None:
    for kind in ("CMD", "HEALTHCHECK"):
        for words in re.findall(rf"^(?:{kind}|    CMD) (\[.*\])$", TEXT, re.MULTILINE):
            assert command_fault([str(word) for word in eval(words)], {}) == ""


def test_what_is_copied_is_sent_to_the_builder_and_nothing_else() -> None:
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", TEXT, re.MULTILINE)
        for source in words.split()
    ]
    assert sorted(copied) == sorted(kept)
    assert all(list(ROOT.glob(source)) for source in copied)
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").startswith("*\n")
    assert not any(
        fnmatch(secret, source) for secret in ("secrets", "bitplan.env", ".git") for source in copied
    )


def test_every_package_of_the_wheel_is_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in (
        *wheel["packages"],
        *wheel["force-include"],
        *project["project"]["license-files"],
        "README.md",
    ):
        assert re.search(rf"^COPY (.* )?{re.escape(name)} ", TEXT, re.MULTILINE), name
