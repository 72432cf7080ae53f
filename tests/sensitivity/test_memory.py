"""What a process holds is looked at in time."""

from __future__ import annotations

import mmap
import subprocess
import sys

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


FREED_BETWEEN_USED = """
from sensitivity import memory
memory.hand_back_freed_memory()
blocks = [bytearray(b"x") * 2**20 for _ in range(200)]
used = blocks[::10]
del blocks
before = memory.anonymous_bytes()
memory.trim()
print(len(used), before - memory.anonymous_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_what_is_freed_between_used_blocks_goes_back_on_request() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FREED_BETWEEN_USED], capture_output=True, text=True, check=True
    )
    used, given_back = map(int, ran.stdout.split())
    assert (used, given_back > 150 * 2**20) == (20, True)
