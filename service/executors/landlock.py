"""Closing parts of the file system to this process and all that it starts, by Linux's Landlock.

Needs no privileges, and cannot be undone (https://docs.kernel.org/userspace-api/landlock.html).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

LEAST_ABI = 3
"""Linux 6.2: before it a file that cannot be written could still be cut off."""
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READ = EXECUTE | READ_FILE
FILE = READ | WRITE_FILE | TRUNCATE
ALL = (TRUNCATE << 1) - 1 & ~READ_DIR
"""Every right of LEAST_ABI but to list names, which the folders above a closed one must allow."""
TCP, TCP_ABI = 0b11, 4
SIGNALS, SIGNALS_ABI = 0b10, 6


def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    return max(0, _syscall(CREATE_RULESET, None, 0, 1))


def restrict(closed: Collection[str], readable: Collection[str], writable: Collection[str]) -> None:
    """Keep this process out of `closed`, but for what is `readable` or `writable` in it, from TCP, and from
    signals to others.

    All are real paths, and whatever is in no closed place stays as it was. The process must have
    no_new_privs. Raises OSError where the kernel cannot.
    """
    version = abi()
    if version < LEAST_ABI:
        raise OSError(f"Landlock must be of version {LEAST_ABI} (Linux 6.2). Got {version or 'none'}")
    network = TCP if version >= TCP_ABI else 0
    scoped = SIGNALS if version >= SIGNALS_ABI else 0
    attributes = struct.pack("QQQ", ALL, network, scoped)[: 8 + 8 * bool(network) + 8 * bool(scoped)]
    ruleset = _checked(CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for place in around(closed):
            _allow(ruleset, place, ALL)
        for name in readable:
            _allow(ruleset, Path(name), READ)
        for name in writable:
            _allow(ruleset, Path(name), ALL)
        _checked(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def around(closed: Collection[str], folder: Path = Path("/")) -> Iterator[Path]:
    """The highest files and folders that hold nothing closed; no symbolic links, which lead to others."""
    for entry in os.scandir(folder):
        if entry.path in closed or entry.is_symlink():
            continue
        if any(place.startswith(f"{entry.path}/") for place in closed):
            yield from around(closed, Path(entry.path))
        else:
            yield Path(entry.path)


def _allow(ruleset: int, place: Path, rights: int) -> None:
    try:
        found = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone, or not ours to open: nothing to allow
        return
    try:
        kept = rights if stat.S_ISDIR(os.fstat(found).st_mode) else rights & FILE
        _checked(ADD_RULE, ruleset, 1, struct.pack("=Qi", kept, found), 0)
    finally:
        os.close(found)


def _syscall(*arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(*arguments))


def _checked(*arguments: object) -> int:
    result = _syscall(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
