"""Who is served while there is no access control."""

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings


def ask(tmp_path, address):
    app = create_app(Settings(data_dir=tmp_path))
    with TestClient(app, client=(address, 50000)) as client:
        return client.get("/v1/limits"), client.get("/docs")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.9.9.9"])
def test_this_machine_is_served(tmp_path, address):
    assert [answer.status_code for answer in ask(tmp_path, address)] == [200, 200]


@pytest.mark.parametrize("address", ["192.0.2.7", "10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1"])
def test_other_machines_are_refused(tmp_path, address):
    for answer in ask(tmp_path, address):
        assert answer.status_code == 403
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:bitplan:problem:access-control-missing"
        assert f"Got one from {address}" in answer.json()["detail"]


def test_the_documentation_pages_load_nothing_from_other_hosts(tmp_path):
    app = create_app(Settings(data_dir=tmp_path))
    with TestClient(app, client=("127.0.0.1", 50000)) as client:
        for page in ("/docs", "/redoc"):
            text = client.get(page).text
            assert "http://" not in text.replace("http://www.w3.org", "")
            assert "https://" not in text
        assert client.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
