"""Where a worker process begins: it gives up what it will not need, then becomes a worker.

``python -m service.executors.confine FD ISOLATION`` is a worker; without arguments it says what a worker
here would not be kept from. A user namespace can only be entered by a process with one thread, so nothing
that starts threads (numpy, torch) may be imported before that.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from service.executors import landlock

Mode = Literal["require", "prefer", "off"]

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x00020000
MS_RDONLY, MS_REC, MS_PRIVATE = 0x1, 0x4000, 0x40000
PR_SET_NO_NEW_PRIVS = 38
CAPABILITIES_V3 = 0x20080522


@dataclass(frozen=True)
class Isolation:
    """How one worker is kept apart.

    mode          "require": a worker that cannot be kept apart does not start; "prefer": it starts, and says
                  what it was not kept from; "off": limits only
    memory_bytes  data that are no shared or read-only mapping of a file; None for no limit
    cpu_seconds   of the loading of the model, and of each unit, over all threads; None for no limit
    file_bytes    of each file that is written; None for no limit
    processes     and threads; holds where the worker has a user namespace of its own and is not root
    closed        places that it can neither read nor write
    readable      places in them that it can read
    writable      places in them that it can read and write
    covered       folders that are empty for it: sockets that are files, which `closed` keeps nobody from
    """

    mode: Mode = "prefer"
    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    file_bytes: int | None = None
    processes: int | None = None
    closed: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    covered: tuple[str, ...] = ()

    def as_json(self) -> str:
        """One line of JSON, the inverse of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `as_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        for name in ("closed", "readable", "writable", "covered"):
            values[name] = tuple(values[name])
        return cls(**values)


def confine(isolation: Isolation) -> tuple[str, ...]:
    """Hold this process within `isolation` for good; what it could not be kept from, and why.

    Call it in a process with one thread.
    """
    limit(isolation)
    if isolation.mode == "off":
        return ("network and files not isolated: BITPLAN_ISOLATION is off",)
    if not sys.platform.startswith("linux"):
        return (f"network and files not isolated: this is {sys.platform}, not Linux",)
    gaps = []
    _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        leave_network()
        _lower(resource.RLIMIT_NPROC, isolation.processes)
    except OSError as error:
        tcp = " (TCP is closed by Landlock)" if landlock.abi() >= landlock.TCP_ABI else ""
        gaps.append(f"network not isolated: {_reason(error)}{tcp}")
    if isolation.covered and not gaps:
        try:
            cover(isolation.covered)
        except OSError as error:
            gaps.append(f"sockets not covered: {_reason(error)}")
    try:
        landlock.restrict(isolation.closed, isolation.readable, isolation.writable)
    except OSError as error:
        gaps.append(f"files not isolated: {_reason(error)}")
    drop_capabilities()
    return tuple(gaps)


def limit(isolation: Isolation) -> None:
    """Memory and the size of files, and no core dumps, which would hold the model."""
    _lower(resource.RLIMIT_DATA, isolation.memory_bytes)
    _lower(resource.RLIMIT_FSIZE, isolation.file_bytes)
    _lower(resource.RLIMIT_CORE, 0)


def limit_cpu(seconds: int | None) -> None:
    """Let this process use so many more seconds of CPU time, from now on; then SIGXCPU ends it."""
    if seconds is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (_smaller(soft, hard), hard))


def leave_network() -> None:
    """Enter a user and a network namespace of this process alone, as the same user. Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    _libc("unshare", CLONE_NEWUSER | CLONE_NEWNET)
    with suppress(OSError):  # then the user has no name, and the same rights
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def cover(folders: Sequence[str]) -> None:
    """Lay an empty file system over folders, for this process and what it starts; it must have a user
    namespace of its own. Raises OSError.
    """
    _libc("unshare", CLONE_NEWNS)
    _libc("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    for folder in folders:
        _libc("mount", b"none", os.fsencode(folder), b"tmpfs", MS_RDONLY, None)


def drop_capabilities() -> None:
    """Be nobody special: the modes of files hold for root too."""
    _libc("capset", struct.pack("Ii", CAPABILITIES_V3, 0), struct.pack("6I", *[0] * 6))


def _lower(kind: int, most: int | None) -> None:
    if most is not None:
        kept = _smaller(most, resource.getrlimit(kind)[1])
        resource.setrlimit(kind, (kept, kept))


def _smaller(most: int, hard: int) -> int:
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


def _libc(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _reason(error: OSError) -> str:
    known = {errno.EPERM: " (the container or the kernel forbids it)", errno.ENOSPC: " (none are left)"}
    return f"{error.strerror or error}{known.get(error.errno or 0, '')}"


def main(arguments: list[str]) -> None:
    """Confine this process, then serve as a worker; without arguments print what is missing, as JSON."""
    if not arguments:
        print(json.dumps(confine(Isolation())))
        return
    isolation = Isolation.from_json(arguments[1])
    gaps = confine(isolation)
    from service.executors import worker

    worker.serve(int(arguments[0]), isolation, gaps)


if __name__ == "__main__":
    main(sys.argv[1:])
