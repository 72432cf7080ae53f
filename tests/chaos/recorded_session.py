"""Sessions whose numbers were measured once by the real one: a worker without torch starts in half a second.

This file is copied into a folder of its own that stands on the path of the service's processes; the answers lie
beside it. A unit's answer depends on the unit alone, so that another calibration set asks for the same measurements
again, in a score set of its own.
"""

import hashlib
import os
import uuid
from pathlib import Path

from sensitivity.spec import SessionSpec
from sensitivity.units import Unit, UnitResult
from service.executors.messages import pack_result, unpack_result

ANSWERS = Path(__file__).parent / "answers"


def answer_of(unit: Unit) -> Path:
    """Where the unit's answer lies."""
    return ANSWERS / hashlib.sha256(unit.key.encode()).hexdigest()


class Recorded:
    """Answers from the record. A unit that was never measured raises FileNotFoundError."""

    def __init__(self, spec: SessionSpec):
        assert spec.calibration.path

    def run(self, unit: Unit) -> UnitResult:
        content = answer_of(unit).read_bytes()
        size = int.from_bytes(content[:8], "big")
        return unpack_result(content[8 : 8 + size], content[8 + size :])


class Recording:
    """The real session, which writes down what it answers."""

    def __init__(self, spec: SessionSpec):
        from sensitivity.session import Session

        self._session = Session(spec)

    def run(self, unit: Unit) -> UnitResult:
        result = self._session.run(unit)
        head, arrays = pack_result(result)
        ANSWERS.mkdir(exist_ok=True)
        growing = ANSWERS / uuid.uuid4().hex
        growing.write_bytes(len(head).to_bytes(8, "big") + head + arrays)
        os.replace(growing, answer_of(unit))
        return result
