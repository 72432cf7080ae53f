from __future__ import annotations

from fractions import Fraction

import pytest

from quant.costs import CostError
from quant.devices import DEVICES, DeviceError
from quant.geometry import Geometry
from quant.latency import Timing, cases
from quant.layers import Inventory, Layer
from quant.schemes import parse_schemes
from service.costing import (
    LatencyMissing,
    Timings,
    cost_request,
    costs_of,
    timings_from_json,
    unmeasured,
)

MENU = parse_schemes("w4,w8")
LAYER = Layer("a", "linear", (64, 128), (64, 128), 64 * 128, None, "other", (), "float32")
INVENTORY = Inventory((LAYER,), (), 64 * 128, 0)
OWN = DEVICES["h100"].as_json() | {"name": "mine", "bytes_per_second": 1e9, "launch_ns": 0}


def costs(geometry=None, timings=None, **members):
    return costs_of(cost_request(members), INVENTORY, MENU, geometry, timings)


def test_a_request_without_costs_has_none():
    found = costs()
    assert (found.latency, found.energy, dict(found.resources), dict(found.sources)) == (None, None, {}, {})


@pytest.mark.parametrize("member", ["latency", "latency_ns"])
def test_a_table_says_that_it_is_one(member):
    found = costs(**{member: {"a": {"w4": 0.5, "w8": 1}}})
    assert found.latency == {"a": {"w4": Fraction(1, 2), "w8": 1}}
    assert found.sources == {"latency": {"source": "table"}}


def test_a_roofline_states_its_error_bar():
    found = costs(latency="roofline:h100")
    assert found.sources["latency"] == {"source": "roofline:h100", "relative_error": 1.0}
    assert set(found.latency["a"]) == {"w4", "w8"}


def test_a_users_own_device_is_used_by_its_name():
    found = costs(latency="roofline:mine", energy="device:mine", device_profile=OWN)
    stored = 64 * 128 // 2 + 2 * 64 + (64 + 128) * 4
    assert found.latency["a"]["w4"] == stored
    assert found.sources["energy"] == {"source": "device:mine"}


def test_measured_latencies_need_timings_and_say_their_spread():
    wanted = cost_request({"latency": "measured"})
    with pytest.raises(LatencyMissing, match="must come from a job"):
        costs_of(wanted, INVENTORY, MENU, None, None)
    timings = Timings("abc", {case.key: Timing(200, 10, 9) for case in cases((LAYER,), MENU, 1)})
    found = costs(timings=timings_from_json(timings.as_json()), latency="measured")
    assert found.latency == {"a": {"w4": 200, "w8": 200}}
    assert found.sources["latency"] == {"source": "measured", "fingerprint": "abc", "relative_error": 0.05}
    with pytest.raises(LatencyMissing, match="another batch"):
        costs(Geometry(0, ()), timings, latency="measured", deployment={"batch": 2})
    assert unmeasured(wanted, INVENTORY, MENU, None).latency == {"a": {"w4": 0, "w8": 0}}


def test_what_a_later_request_leaves_out_is_that_of_the_job():
    job = {"latency_ns": {"a": {"w4": 1}}, "energy": "device:h100", "deployment": {"batch": 4}}
    kept = cost_request({"energy": None}, job)
    assert (kept.latency, kept.energy, kept.batch) == ({"a": {"w4": 1}}, "device:h100", 4)
    changed = cost_request({"latency": "roofline:h200"}, job)
    assert changed.latency == "roofline:h200"
    assert "latency_ns" not in changed.members


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        ({"latency": "roofline:tpu"}, CostError, "must be one of h100.*Got 'tpu'"),
        ({"latency": "guessed"}, CostError, 'table, "measured" or'),
        ({"energy": "h100"}, CostError, 'table or "device:NAME"'),
        ({"latency": "measured", "device_profile": {"name": "x"}}, DeviceError, "must be given"),
        ({"deployment": {"kv_cache": "int3"}}, CostError, "key-value cache"),
        ({"deployment": {"batch": 1}}, CostError, "attention layers"),
    ],
)
def test_what_cannot_be_costed_is_refused(members, error, words):
    with pytest.raises(error, match=words):
        costs(**members)
