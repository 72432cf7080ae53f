"""Timings are taken once per device, and kept in the data directory."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from quant.latency import Case, Timing
from sensitivity.spec import SessionSpec
from service.costing import Timings
from service.errors import ServiceError
from service.runner.context import JobContext
from service.runner.timing import read_cache, timed, write_cache

CASES = [Case("dense", 16, 32, 1, "float32"), Case("int4_weight_only", 16, 32, 1, "float32", 32)]


def test_what_was_timed_on_this_device_is_not_timed_again(
    new_context: Callable[..., JobContext], spec: SessionSpec
) -> None:
    context = new_context()
    first = timed(context, spec, CASES[:1])
    both = timed(context, spec, CASES)
    assert both.fingerprint == first.fingerprint
    assert both.timings[CASES[0].key] == first.timings[CASES[0].key]
    assert set(both.timings) == {case.key for case in CASES}
    assert timed(context, spec, CASES) == both
    folder = context.settings.data_dir / "latency"
    kept = json.loads((folder / f"{both.fingerprint}.json").read_text())
    assert kept["device"]["device"] == "cpu"


def test_timings_of_another_device_do_not_count(
    new_context: Callable[..., JobContext], spec: SessionSpec
) -> None:
    context = new_context()
    folder = context.settings.data_dir / "latency"
    write_cache(folder, Timings("other", {CASES[0].key: Timing(1.0, 0.0, 1)}), {})
    (folder / "broken.json").write_text("{")
    found = timed(context, spec, CASES[:1])
    assert found.fingerprint != "other"
    assert found.timings[CASES[0].key].repeats > 1
    assert set(read_cache(folder)) == {"other", found.fingerprint}


def test_a_device_without_kernels_is_a_problem(
    new_context: Callable[..., JobContext], spec: SessionSpec
) -> None:
    from dataclasses import replace

    with pytest.raises(ServiceError, match="device must be cpu"):
        timed(new_context(), replace(spec, device="cuda"), CASES)
