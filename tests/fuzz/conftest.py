import pytest

from tests.fuzz.effort import Effort
from tests.service.conftest import database_url, empty_database_url  # noqa: F401


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.nightly)])
def effort(request: pytest.FixtureRequest) -> Effort:
    return Effort(request.param == "long")
