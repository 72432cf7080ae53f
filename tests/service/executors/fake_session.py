"""A session without torch: its numbers are digests of the unit, and the layer's name says what goes wrong."""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from sensitivity.errors import BadModel, NonFiniteScore
from sensitivity.spec import SessionSpec
from sensitivity.units import BlockUnit, InspectUnit, MeasureUnit, ScoreRow, ScoreUnit, Unit, UnitResult

BIG_BYTES = 50 * 2**20


class FakeSession:
    """The place of the model decides how building ends: "broken" raises, "deadly" kills the process."""

    def __init__(self, spec: SessionSpec):
        self.spec = spec
        note("built", spec)
        if spec.model.location == "broken":
            raise BadModel("The model must load. Got a broken one. Send another.")
        if spec.model.location == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, unit: Unit) -> UnitResult:
        note(unit.key, self.spec)
        if isinstance(unit, ScoreUnit):
            misbehave(unit.layer)
            return self._scores(unit)
        if isinstance(unit, BlockUnit):
            doubled = {f"given.{name}": array * 2 for name, array in unit.given.items()}
            return UnitResult(arrays={"sum": numbers(unit.key, 4), **doubled}, facts={"forwards": 8})
        if isinstance(unit, MeasureUnit):
            facts = {"divergence": {"mean": number(unit.key), "stderr": 0.0, "n": 4}, "forwards": 4}
            return UnitResult(arrays={"divergence": numbers(unit.key, 4)}, facts=facts)
        assert isinstance(unit, InspectUnit)
        return UnitResult(facts={"task": "generic", "threads": os.environ.get("OMP_NUM_THREADS")})

    def _scores(self, unit: ScoreUnit) -> UnitResult:
        rows = tuple(
            ScoreRow(unit.layer, unit.scheme, metric, self._value(unit, metric), 0.125, 8)
            for metric in unit.metrics
        )
        arrays = {"sketch": numbers(unit.layer, 8)} if "gram_output" in unit.metrics else {}
        if unit.layer == "big":
            arrays = {"sketch": np.arange(BIG_BYTES // 8, dtype=np.int64)}
        return UnitResult(scores=rows, arrays=arrays, facts={"forwards": 8})

    def _value(self, unit: ScoreUnit, metric: str) -> float:
        if unit.layer == "nan":
            return float("nan")
        return number(f"{unit.layer}|{unit.scheme}|{metric}|{self.spec.seed}")


def misbehave(layer: str) -> None:
    """Layers are named kill, kill_once:FILE, exit, error, memory, nonfinite, sleep:SECONDS."""
    verb, _, rest = layer.partition(":")
    if verb == "kill" or (verb == "kill_once" and first_time(rest)):
        print("about to die", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "exit":
        os._exit(3)
    if verb == "error":
        raise RuntimeError("The layer must behave. Got an error.")
    if verb == "memory":
        raise MemoryError("8 bytes too many")
    if verb == "nonfinite":
        raise NonFiniteScore("output_kl", layer, "w4", "nan")
    if verb == "sleep":
        time.sleep(float(rest))


def first_time(marker: str) -> bool:
    """True once for all processes."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def note(what: str, spec: SessionSpec) -> None:
    """Leave a line in the file that the calibration's path names, if it is an absolute path."""
    if spec.calibration.path.startswith("/"):
        with Path(spec.calibration.path).open("a") as file:
            file.write(f"{what}\n")


def number(text: str) -> float:
    """A number between 0 and 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def numbers(text: str, count: int) -> np.ndarray:
    """Several such numbers."""
    return np.array([number(f"{text}|{index}") for index in range(count)])


def environment_of_worker(spec: SessionSpec) -> "EnvironmentSession":
    """Another factory: a session that tells what it knows."""
    return EnvironmentSession()


class EnvironmentSession:
    """Gives its process's environment and loaded modules."""

    def run(self, unit: Unit) -> UnitResult:
        facts = {"environment": dict(os.environ), "torch": "torch" in sys.modules, "pid": os.getpid()}
        return UnitResult(facts=facts)
