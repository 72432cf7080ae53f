"""Where the published inputs must be there (CI), a skipped reference test is a failed one."""

import os
from collections.abc import Generator

import pytest

REQUIRED = "BITPLAN_REQUIRE_REFERENCE"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get(REQUIRED):
        report.outcome = "failed"
        report.longrepr = (
            f"{REQUIRED} is set: {item.nodeid} must run. Got a skip. Put ../shared/reference in place."
        )
    return report
