"""A session that does what the layer's name says: whatever a stranger's model should not be able to do."""

import os
import resource
import socket
import time
from pathlib import Path

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult


class CuriousSession:
    """Raises what the deed raises; else its facts say what was found."""

    def __init__(self, spec: SessionSpec):
        pass

    def run(self, unit: Unit) -> UnitResult:
        verb, _, rest = unit.layer.partition(":")
        return UnitResult(facts={"found": getattr(self, verb)(rest)})

    def connect(self, port: str) -> str:
        socket.create_connection(("127.0.0.1", int(port)), 5).close()
        return "connected"

    def knock(self, path: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        return "connected"

    def sockets(self, folder: str) -> list[str]:
        return sorted(str(path) for path in Path(folder).rglob("*") if path.is_socket())

    def datagram(self, _: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(("127.0.0.1", 9))
        return "connected"

    def read(self, path: str) -> str:
        return Path(path).read_text()

    def write(self, path: str) -> str:
        Path(path).write_text("changed")
        return "written"

    def force(self, path: str) -> str:
        Path(path).chmod(0o644)
        return self.write(path)

    def grow(self, size: str) -> str:
        with Path(os.environ["TMPDIR"], "big").open("wb") as file:
            file.truncate(int(size))
        return "grown"

    def allocate(self, size: str) -> int:
        return len(bytearray(int(size)))

    def spin(self, _: str) -> str:
        while True:
            pass

    def environment(self, _: str) -> dict[str, str]:
        return dict(os.environ)

    def parent(self, _: str) -> str:
        return Path(f"/proc/{os.getppid()}/environ").read_text()

    def limits(self, _: str) -> dict[str, int]:
        names = ("DATA", "FSIZE", "CORE", "NPROC")
        return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in names}

    def kill(self, pid: str) -> str:
        os.kill(int(pid), 0)
        return "could"


class Seeing:
    """Pauses as the layer's name says ("pause:SECONDS:ANYTHING"), then tells where it is and what is there."""

    def __init__(self, spec: SessionSpec):
        self._spec = spec

    def run(self, unit: Unit) -> UnitResult:
        time.sleep(float(unit.layer.split(":")[1]))
        model = Path(self._spec.model.location)
        found = {
            "node": model.parent.parent.name.removeprefix("cache-"),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "model": str(model),
            "files": {file.name: file.stat().st_size for file in model.iterdir()},
            "text": Path(self._spec.calibration.path).read_text(),
        }
        return UnitResult(facts={"found": found})
