"""Arrays of finished blocks: those of artifacts are read when asked for, within a bound."""

from __future__ import annotations

import numpy as np
import pytest

from service.runner import finished
from service.runner.finished import Finished


def test_what_is_read_is_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "KEPT_BYTES", 2 * 80)
    read: list[str] = []

    def arrays(artifact: str) -> dict[str, np.ndarray]:
        read.append(artifact)
        return {"values": np.full(10 if artifact != "large" else 100, float(len(read)))}

    done = Finished(arrays)
    for key, artifact in (("a", "A"), ("b", "B"), ("c", "C"), ("huge", "large"), ("empty", None)):
        done.store(key, artifact)
    done.put("joined", {"values": np.zeros(1000)})
    assert set(done) == {"a", "b", "c", "huge", "empty", "joined"}
    assert "a" in done
    assert read == []
    assert [done[key]["values"][0] for key in "abab"] == [1, 2, 1, 2]
    assert done["c"]["values"][0] == 3
    assert done["b"]["values"][0] == 2
    assert done["a"]["values"][0] == 4
    assert len(done["huge"]["values"]) == 100
    assert read == ["A", "B", "C", "A", "large"]
    assert (dict(done["empty"]), len(done["joined"]["values"])) == ({}, 1000)
    with pytest.raises(KeyError):
        done["d"]
