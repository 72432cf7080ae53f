"""`bitplan gc`, `doctor`, `backup` and `restore`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from service.store.blobs import BlobStore

Bitplan = Callable[..., Result]
Ask = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path, bitplan: Bitplan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of a migrated service."""
    monkeypatch.setenv("BITPLAN_DATA_DIR", str(tmp_path / "data"))
    assert bitplan("migrate").exit_code == 0
    return tmp_path / "data"


def test_gc_says_what_it_would_do_and_does_it(data: Path, answer: Ask, bitplan: Bitplan) -> None:
    store = BlobStore(data)
    blob = store.put_bytes(b"nobody's")
    os.utime(store.path(blob), (0, 0))
    found = answer("gc", "--dry-run")
    assert found["dry_run"]
    assert {"what": "blobs", "count": 1, "bytes": 8} in found["collected"]
    assert store.has(blob)
    assert "would be deleted" in bitplan("gc", "--dry-run").stdout
    result = bitplan("gc")
    assert "8 B" in result.stdout
    assert not store.has(blob)


def test_gc_needs_a_database(tmp_path: Path, bitplan: Bitplan) -> None:
    result = bitplan("gc", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "Got an empty database" in result.stderr
