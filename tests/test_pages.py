"""Pages that name tests as evidence name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "docs/ingest.md": {"": "tests/service/ingest", "## Models of a hub": "tests/service/hub"},
    "docs/strangers.md": {"": "tests"},
}
"""Page -> heading -> the folder that its tests are in."""
NAMED = re.compile(r"`(?:([\w./-]+\.py)::)?(test_\w+)`")


def cited(page: str) -> list[tuple[str, str]]:
    """Each test that the page names, as its file and its function."""
    homes = HOMES[page]
    found, home, file = [], homes[""], ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            home = homes.get(line, homes[""])
        for path, name in NAMED.findall(line):
            file = path or file
            found.append((str((ROOT / home / file).resolve()), name))
    return found


@pytest.mark.parametrize("page", HOMES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = cited(page)
    assert len(named) > 20
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not Path(file).is_file() or f"def {name}(" not in Path(file).read_text(encoding="utf-8")
    ]
    assert missing == []
