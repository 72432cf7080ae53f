"""docker-compose.yml: it fits the Compose Specification, is hardened, and says what the program understands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.deployment.rules import ROOT, Image, faults, load, schema_fault

TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
GPUS = (ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8")
Compose = dict[str, Any]


@pytest.fixture(scope="module")
def image() -> Image:
    return Image.of(DOCKERFILE)


@pytest.fixture
def compose() -> Compose:
    return copy.deepcopy(load(TEXT))


def test_nothing_is_wrong(compose: Compose, image: Image) -> None:
    assert faults(compose, image) == []
    assert set(compose["services"]) == {
        "postgres",
        "migrate",
        "api",
        "runner",
        "ray-head",
        "ray-worker",
        "runner-cluster",
    }
    cluster = {
        name for name, service in compose["services"].items() if service.get("profiles") == ["cluster"]
    }
    assert cluster == {"ray-head", "ray-worker", "runner-cluster"}


def test_variables_choose(image: Image) -> None:
    chosen = load(
        TEXT, {"API_PORT": "9000", "TORCH_BACKEND": "cu130", "RUNNER_MEMORY": "64g", "RAY_WORKERS": "8"}
    )
    assert faults(chosen, image) == []
    assert chosen["services"]["api"]["ports"] == ["127.0.0.1:9000:8000"]
    assert chosen["services"]["runner"]["build"]["args"]["TORCH_BACKEND"] == "cu130"
    assert chosen["services"]["ray-worker"]["deploy"]["replicas"] == 8
    assert load(TEXT, {"API_PORT": "8000-8001"})["services"]["api"]["ports"] == ["127.0.0.1:8000-8001:8000"]


def test_gpus_go_to_whoever_measures(compose: Compose) -> None:
    overlay = yaml.safe_load(GPUS)
    assert set(overlay["services"]) <= set(compose["services"])
    for name, service in overlay["services"].items():
        compose["services"][name]["deploy"] = {
            **compose["services"][name].get("deploy", {}),
            **service["deploy"],
        }
    assert schema_fault(compose) == ""
    (device,) = compose["services"]["runner"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_only_the_api_is_published_and_only_two_networks_lead_out(compose: Compose) -> None:
    services = compose["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    out = {name for name, service in services.items() if {"front", "outside"} & set(service["networks"])}
    assert out == {"api", "runner", "runner-cluster"}
    assert services["ray-worker"]["networks"] == ["cluster"]


def drop(service: str, key: str) -> Callable[[Compose], object]:
    return lambda compose: compose["services"][service].pop(key)


def put(service: str, **values: Any) -> Callable[[Compose], object]:
    return lambda compose: compose["services"][service].update(values)


def environment(service: str, **values: str) -> Callable[[Compose], object]:
    def change(compose: Compose) -> None:
        compose["services"][service]["environment"] = {
            **compose["services"][service]["environment"],
            **values,
        }

    return change


def word(service: str, old: str, new: str) -> Callable[[Compose], object]:
    def change(compose: Compose) -> None:
        command = compose["services"][service]["command"]
        assert old in command
        compose["services"][service]["command"] = [new if known == old else known for known in command]

    return change


def check(service: str, *words: str) -> Callable[[Compose], object]:
    return put(service, healthcheck={"test": ["CMD", *words]})


MUTATIONS: dict[str, tuple[Callable[[Compose], object], str]] = {
    "unknown key": (
        put("api", restrat="always"),
        "it does not fit the Compose Specification: services.api: ",
    ),
    "unknown condition": (
        put("api", depends_on={"postgres": {"condition": "ready"}}),
        "unknown variant `ready`",
    ),
    "bad duration": (put("api", stop_grace_period="30 parsecs"), "is not a valid duration unit"),
    "bad port": (put("api", ports=["127.0.0.1:80000:8000"]), "number too large"),
    "undeclared network": (put("runner", networks=["nowhere"]), "network `nowhere`"),
    "undeclared volume": (put("runner", volumes=["nothing:/data"]), "volumes: nothing is not declared"),
    "undeclared secret": (put("runner", secrets=["nothing"]), "secret `nothing`"),
    "unused secret": (
        drop("ray-worker", "secrets"),
        "ray-worker: it names the secret ray_token, which it does not get",
    ),
    "idle secret": (put("migrate", secrets=["postgres_password", "ray_token"]), "gets the secret ray_token"),
    "root": (put("api", user="0:0"), "api: user must be 10001:10001"),
    "no user": (drop("ray-head", "user"), "ray-head: user must be 10001:10001, which is not root. Got None"),
    "another user": (put("postgres", user="70:70"), "postgres: user must be 999:999"),
    "writable root": (drop("runner", "read_only"), "runner: its root file system must be read-only"),
    "capabilities": (put("runner", cap_add=["SYS_ADMIN"]), "runner: it must drop all capabilities"),
    "privileges": (put("api", security_opt=["apparmor:unconfined"]), "api: it must have no-new-privileges"),
    "host network": (
        lambda c: [c["services"]["api"].pop(k) for k in ("networks",)] and put("api", network_mode="host")(c),
        "namespaces of its own",
    ),
    "no temporary files": (drop("api", "tmpfs"), "api: /tmp must be a tmpfs of limited size"),
    "no init": (drop("runner", "init"), "runner: it must have an init"),
    "no memory limit": (drop("ray-worker", "mem_limit"), "ray-worker: mem_limit must be set"),
    "endless log": (put("api", logging={"driver": "local"}), "api: its log must have a max-size"),
    "no health check": (
        drop("runner", "healthcheck"),
        "runner: a service that goes on must have a health check",
    ),
    "not restarted": (drop("api", "restart"), "api: a service that goes on must be restarted"),
    "killed early": (put("runner", stop_grace_period="10s"), "stop_grace_period must be at least 25 s"),
    "not waited for": (
        put("api", depends_on={"migrate": {"condition": "service_started"}}),
        "migrate must be waited for until service_completed_successfully",
    ),
    "nobody to wait for": (put("api", depends_on={"db": {"condition": "service_healthy"}}), "there is no db"),
    "waits for a profile": (
        put("runner", depends_on={"ray-head": {"condition": "service_healthy"}}),
        "ray-head is not there without its profile",
    ),
    "a circle": (
        put("postgres", depends_on={"api": {"condition": "service_healthy"}}),
        "api -> postgres -> api",
    ),
    "published to all": (put("api", ports=["8000:8000"]), "must be published on 127.0.0.1 alone"),
    "wrong port": (put("api", ports=["127.0.0.1:8000:80"]), "must lead to port 8000"),
    "database published": (
        put("postgres", ports=["127.0.0.1:5432:5432"], command=["postgres"]),
        "must lead to port 8000",
    ),
    "no way in": (put("api", networks=["database"]), "is not reachable from an internal network"),
    "a way out": (lambda c: c["networks"].update(database=None), "networks: database must be internal"),
    "nobody's volume": (lambda c: c["volumes"].update(more=None), "volumes: more is used by nobody"),
    "root's folder": (put("runner", volumes=["data:/var/data"]), "/var/data must be a folder of the image"),
    "data not kept": (drop("runner", "volumes"), "volumes: /data must be kept"),
    "no setting": (environment("runner", BITPLAN_WORKER="2"), "BITPLAN_WORKER is no setting"),
    "bad setting": (environment("runner", BITPLAN_WORKERS="many"), "its settings are none"),
    "unknown access": (environment("api", BITPLAN_ACCESS="nobody"), "its settings are none"),
    "a secret": (
        environment("api", BITPLAN_DATABASE_PASSWORD="hunter2"),
        "BITPLAN_DATABASE_PASSWORD must come from a file",
    ),
    "a secret in a URL": (
        environment("api", BITPLAN_DATABASE_URL="postgresql://u:hunter2@postgres/bitplan"),
        "BITPLAN_DATABASE_URL must have no password in its URL",
    ),
    "unknown command": (word("migrate", "migrate", "migrations"), "No such command 'migrations'"),
    "unknown option": (put("runner", command=["bitplan", "runner", "--worker", "2"]), "No such option"),
    "unknown program": (put("api", command=["gunicorn", "service.app:app"]), "gunicorn is not in the image"),
    "unknown application": (word("api", "service.app:app", "service.app:api"), "service.app has no api"),
    "unknown option of uvicorn": (word("api", "--no-server-header", "--no-banner"), "No such option"),
    "unknown option of ray": (word("ray-head", "--num-cpus=0", "--cpus=0"), "No such option"),
    "a head elsewhere": (
        word("ray-worker", "--address=ray-head:6379", "--address=head:6379"),
        "nobody listens at head:6379",
    ),
    "a head's other port": (
        word("ray-head", "--port=6379", "--port=6380"),
        "nobody listens at ray-head:6379",
    ),
    "a node elsewhere": (word("runner-cluster", "ray-head:6379", "head:6379"), "there is no service head"),
    "bad check": (check("runner", "bitplan", "runner", "--health"), "No such option"),
    "a check that asks nothing": (check("api", "python", "-c", "pass"), "it must ask /readyz"),
    "a broken check": (check("api", "python", "-c", "import"), "invalid syntax"),
    "unknown option of pg_isready": (check("postgres", "pg_isready", "--hosts=x"), "it has no --hosts=x"),
    "unknown argument": (
        put("api", build={"context": ".", "args": {"TORCH": "cpu"}}),
        "the Dockerfile has no argument TORCH",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_is_found(compose: Compose, image: Image, name: str) -> None:
    change, words = MUTATIONS[name]
    change(compose)
    found = faults(compose, image)
    assert any(words in fault for fault in found), found


def test_a_variable_without_a_default_is_found() -> None:
    with pytest.raises(KeyError, match="API_PORT must have a default"):
        load(TEXT.replace("${API_PORT:-8000}", "${API_PORT}"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("USER 10001:10001", "USER 10002:10002", "user must be 10002:10002"),
        ("USER 10001:10001", "", "user must be root, which is not root"),
        ("-m 0750 /data /cache", "-m 0750 /data", "/cache must be a folder of the image"),
        ("-o 10001 -g 10001", "-o 0 -g 0", "/data must be a folder of the image that belongs to 10001:10001"),
        ("EXPOSE 8000", "EXPOSE 80", "must lead to port 80"),
        ("ARG EXTRAS", "ARG PARTS", "the Dockerfile has no argument EXTRAS"),
    ],
)
def test_a_dockerfile_that_does_not_fit_is_found(compose: Compose, old: str, new: str, words: str) -> None:
    assert old in DOCKERFILE
    found = faults(compose, Image.of(DOCKERFILE.replace(old, new)))
    assert any(words in fault for fault in found), found
