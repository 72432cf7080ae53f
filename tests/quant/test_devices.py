from __future__ import annotations

import json
from fractions import Fraction

import pytest

from quant.devices import DEVICES, DeviceError, read_device


@pytest.mark.parametrize("name", DEVICES)
def test_a_profile_is_plain_data_and_is_read_back(name):
    device = DEVICES[name]
    assert device.name == name
    assert read_device(json.dumps(device.as_json())) == device
    assert device.relative_error > 0
    assert device.source


def test_the_roofline_is_the_longer_of_two_and_the_launch():
    device = DEVICES["h200"]
    memory = device.nanoseconds("bfloat16", 10, Fraction(4_800_000))
    assert float(memory) == pytest.approx(1000 + device.launch_ns)
    assert float(device.nanoseconds("bfloat16", 989_000_000, Fraction(1))) == pytest.approx(
        1000 + device.launch_ns
    )


def test_a_type_without_a_rate_runs_in_the_widest():
    device = DEVICES["cpu-avx512"]
    assert device.nanoseconds("bfloat16", 1000, Fraction(0)) == device.nanoseconds(
        "float32", 1000, Fraction(0)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes_per_second": 0}, "/bytes_per_second must be more than 0"),
        ({"bytes_per_second": "fast"}, "/bytes_per_second must be a number"),
        ({"operations": {}}, "/operations must be rates of some of float32"),
        ({"operations": {"int3": 1}}, "/operations must be rates"),
        ({"launch_ns": -1}, "/launch_ns must be 0 or more"),
        ({"color": "green"}, "/color must be one of"),
    ],
)
def test_a_bad_profile_says_where(change, message):
    with pytest.raises(DeviceError, match=message):
        read_device(DEVICES["h100"].as_json() | change)


def test_a_profile_must_be_json():
    with pytest.raises(DeviceError, match="Device profile is not valid"):
        read_device("{")
