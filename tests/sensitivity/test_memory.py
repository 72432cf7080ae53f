"""What a process holds is looked at in time."""

from __future__ import annotations

import mmap

import pytest

from sensitivity import memory
from sensitivity.memory import Peak, anonymous_bytes

SIZE = 2**26


def test_a_peak_sees_what_is_held_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However rarely it looks. Mapped apart, for the heap may have so much left from earlier tests."""
    monkeypatch.setattr(memory, "LOOK_SECONDS", 60.0)
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        before = anonymous_bytes()
        with Peak() as peak:
            held.write(b"x" * SIZE)
        assert peak.bytes - before > SIZE * 3 // 4
