"""Which process this is, and whether another one of this host still lives."""

import os
import socket
import subprocess
import uuid
from pathlib import Path

from service.db.repositories.leases import Owner

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> Owner:
    """A fresh owner of leases in this process."""
    pid = os.getpid()
    return Owner(name=uuid.uuid4().hex, host=host_name(), pid=pid, process=start_of(pid) or "")


def host_name() -> str:
    """The name of the place where a process id means one process: the host, and on Linux its pid namespace.

    Two containers with one host name must not take each other's processes for dead.
    """
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_of(pid: int) -> str | None:
    """When the process with this id began: "" if that cannot be known, None if there is no such process.

    A zombie, which has ended but was not waited for, counts as ended.
    """
    if not Path("/proc/self/stat").exists():
        return _start_by_ps(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return None if state in "ZX" else f"{_BOOT.read_text().strip()}/{started}"


def _start_by_ps(pid: int) -> str | None:
    try:
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False)  # noqa: S603, S607 - a fixed command of the system
    except OSError:
        return ""
    return found.stdout.decode(errors="replace").strip() or None


def is_dead(pid: int | None, process: str | None) -> bool:
    """Whether the process of a lease of this host has certainly ended; its pid may belong to another one by
    now.
    """
    if pid is None or not process:
        return False
    started = start_of(pid)
    return started is None or started not in ("", process)
