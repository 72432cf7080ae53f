"""What must hold of docker-compose.yml and the Dockerfile beyond their schemas. Faults are sentences; a sound file has none."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import typer
import uvicorn
import yaml
from compose_spec import PyCompose

from service.settings import Settings

ROOT = Path(__file__).parents[2]
SECRETS = "/run/secrets/"
POSTGRES_USER = "999:999"
"""Of the image's own user, so that nothing in it runs as root."""
GRACE_SECONDS = {"migrate": 0}
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY$")


def load(text: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with variables (or what it says instead of them) filled in. Raises KeyError for one without either."""
    given = variables or {}

    def fill(found: re.Match[str]) -> str:
        value = given.get(found[1]) or found[2]
        if value is None:
            raise KeyError(f"{found[1]} must have a default")
        return value

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(fill, text))
    for service in loaded["services"].values():
        if "environment" in service:
            service["environment"] = {name: str(value) for name, value in service["environment"].items()}
    return loaded


def schema_fault(compose: Mapping[str, Any]) -> str:
    """Why it is not a file of the Compose Specification; "" where it is."""
    try:
        parsed = PyCompose.from_yaml(yaml.safe_dump(dict(compose), sort_keys=False))
        parsed.validate()
    except ValueError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Image:
    """What the compose file relies on in the Dockerfile."""

    user: str
    folders: frozenset[str]
    port: str
    arguments: frozenset[str]

    @classmethod
    def of(cls, text: str) -> Image:
        lines = text.replace("\\\n", " ")
        last = lines[lines.rindex("\nFROM ") :]
        made = re.findall(r"install -d -o (\d+) -g (\d+) [^&\n]*?((?: /\w+)+)", last)
        users = re.findall(r"^USER (.+)$", last, re.MULTILINE)
        user = users[-1] if users else "root"
        return cls(
            user,
            frozenset(
                folder
                for owner, group, folders in made
                if f"{owner}:{group}" == user
                for folder in folders.split()
            ),
            re.findall(r"^EXPOSE (\d+)$", last, re.MULTILINE)[0],
            frozenset(re.findall(r"^ARG (\w+)", lines, re.MULTILINE)),
        )


def faults(compose: Mapping[str, Any], image: Image) -> list[str]:
    """Everything that is wrong with the file, a sentence each."""
    if wrong := schema_fault(compose):
        return [f"it does not fit the Compose Specification: {wrong}"]
    return [
        f"{name}: {fault}"
        for name, service in compose["services"].items()
        for fault in _of_service(compose, name, service, image)
    ] + list(_of_file(compose))


def _of_file(compose: Mapping[str, Any]) -> Iterator[str]:
    services = compose["services"]
    for kind in ("volumes", "networks", "secrets"):
        used = {source for service in services.values() for source in _names(service.get(kind, ()))}
        for name in sorted(set(compose.get(kind, {})) - used):
            yield f"{kind}: {name} is used by nobody"
        for name in sorted(used - set(compose.get(kind, {}))):
            yield f"{kind}: {name} is not declared"
    for name, network in compose["networks"].items():
        closed = bool((network or {}).get("internal"))
        if closed != (name not in ("front", "outside")):
            yield f"networks: {name} must {'lead out' if closed else 'be internal'}"
    yield from _circles(services)


def _names(entries: Any) -> list[str]:
    return [str(entry).partition(":")[0] for entry in entries]


def _circles(services: Mapping[str, Any]) -> Iterator[str]:
    def below(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield f"depends_on: {' -> '.join((*path, name))}"
            return
        for other in services.get(name, {}).get("depends_on", {}):
            yield from below(other, (*path, name))

    for name in services:
        yield from below(name, ())


def _of_service(
    compose: Mapping[str, Any], name: str, service: Mapping[str, Any], image: Image
) -> Iterator[str]:
    ours = "build" in service
    yield from _hardening(service, image.user if ours else POSTGRES_USER)
    yield from _limits(service)
    yield from _life(service, compose["services"])
    yield from _secrets(service)
    yield from _ports(service, image)
    if ours:
        yield from _volumes(service, image)
        yield from _settings(service)
        for argument in set(service["build"]["args"]) - image.arguments:
            yield f"the Dockerfile has no argument {argument}"
    commands = [service.get("command", []), *_check_of(service)]
    for words in commands:
        if words and (wrong := command_fault(words, compose["services"])):
            yield f"{' '.join(words)}: {wrong}"


def _hardening(service: Mapping[str, Any], user: str) -> Iterator[str]:
    if service.get("user") != user or user.split(":", maxsplit=1)[0] in ("0", "root"):
        yield f"user must be {user}, which is not root. Got {service.get('user')}"
    if not service.get("read_only"):
        yield "its root file system must be read-only"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "it must drop all capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", ()):
        yield "it must have no-new-privileges"
    if service.get("privileged") or "network_mode" in service or "pid" in service or "ipc" in service:
        yield "it must have namespaces of its own"
    if not any(place.startswith("/tmp:") and "size=" in place for place in service.get("tmpfs", ())):
        yield "/tmp must be a tmpfs of limited size"
    if not service.get("init"):
        yield "it must have an init, which reaps what workers leave"


def _limits(service: Mapping[str, Any]) -> Iterator[str]:
    for key in ("mem_limit", "pids_limit"):
        if not service.get(key):
            yield f"{key} must be set"
    if "max-size" not in service.get("logging", {}).get("options", {}):
        yield "its log must have a max-size"


def _life(service: Mapping[str, Any], services: Mapping[str, Any]) -> Iterator[str]:
    """Health, restarts, stopping, and what it waits for."""
    once = service.get("restart") == "no"
    if not once:
        if not _check_of(service):
            yield "a service that goes on must have a health check"
        if service.get("restart") != "unless-stopped":
            yield "a service that goes on must be restarted unless it was stopped"
        grace = int(str(service.get("stop_grace_period", "0s")).removesuffix("s"))
        least = Settings.model_fields["grace_seconds"].default + 15
        if grace < least:
            yield f"stop_grace_period must be at least {least:g} s, which is more than BITPLAN_GRACE_SECONDS. Got {grace} s"
    for other, how in service.get("depends_on", {}).items():
        if other not in services:
            yield f"depends_on: there is no {other}"
            continue
        ends = services[other].get("restart") == "no"
        must = "service_completed_successfully" if ends else "service_healthy"
        if how["condition"] != must:
            yield f"depends_on: {other} must be waited for until {must}. Got {how['condition']}"
        if set(services[other].get("profiles", ())) - set(service.get("profiles", ())):
            yield f"depends_on: {other} is not there without its profile"


def _check_of(service: Mapping[str, Any]) -> list[list[str]]:
    test = service.get("healthcheck", {}).get("test", [])
    return [test[1:]] if test[:1] == ["CMD"] else []


def _secrets(service: Mapping[str, Any]) -> Iterator[str]:
    environment, given = service.get("environment", {}), set(service.get("secrets", ()))
    named = {value.removeprefix(SECRETS) for value in environment.values() if value.startswith(SECRETS)}
    for name in sorted(named - given):
        yield f"it names the secret {name}, which it does not get"
    for name in sorted(given - named):
        yield f"it gets the secret {name}, which nothing in it names"
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and not name.endswith(("_FILE", "_PATH")):
            yield f"{name} must come from a file"
        if re.search(r"://[^/@]*:[^/@]*@", value):
            yield f"{name} must have no password in its URL"


def _ports(service: Mapping[str, Any], image: Image) -> Iterator[str]:
    for port in service.get("ports", ()):
        host, _, target = str(port).rpartition(":")
        if not host.startswith("127.0.0.1:"):
            yield f"ports: {port} must be published on 127.0.0.1 alone"
        if target != image.port or target not in service["command"]:
            yield f"ports: {port} must lead to port {image.port}, where it listens"
        if "front" not in service.get("networks", ()):
            yield f"ports: {port} is not reachable from an internal network"


def _volumes(service: Mapping[str, Any], image: Image) -> Iterator[str]:
    for volume in service.get("volumes", ()):
        target = volume.split(":")[1]
        if target not in image.folders:
            yield f"volumes: {target} must be a folder of the image that belongs to {image.user}"
    data = service.get("environment", {}).get("BITPLAN_DATA_DIR")
    if data is not None and not any(volume.split(":")[1] == data for volume in service.get("volumes", ())):
        yield f"volumes: {data} must be kept"


def _settings(service: Mapping[str, Any]) -> Iterator[str]:
    """Each BITPLAN_ variable is a setting, and together they are settings."""
    environment = {
        key: value for key, value in service.get("environment", {}).items() if key.startswith("BITPLAN_")
    }
    names = {f"BITPLAN_{name.upper()}" for name in Settings.model_fields}
    for name in environment:
        if name not in names and name.removesuffix("_FILE") not in names:
            yield f"{name} is no setting"
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("secret\n")
        given = {
            key: str(secret) if str(value).startswith(SECRETS) else str(value)
            for key, value in environment.items()
        }
        with mock.patch.dict(os.environ, given, clear=True):
            try:
                Settings()
            except ValueError as error:
                yield f"its settings are none: {error}"


def command_fault(words: list[str], services: Mapping[str, Any]) -> str:
    """Why a command cannot be what its program understands; "" where it can."""
    program, *arguments = [str(word) for word in words]
    if program == "on-ray-node":
        host = arguments[0].partition(":")[0]
        return command_fault(arguments[1:], services) if host in services else f"there is no service {host}"
    if program == "python":
        return _python_fault(arguments)
    if program == "pg_isready":
        return _options_fault(program, arguments)
    commands = {"bitplan": _bitplan, "uvicorn": lambda: uvicorn.main, "ray": _ray}
    if program not in commands:
        return f"{program} is not in the image"
    return _click_fault(commands[program](), program, arguments) or _reference_fault(arguments, services)


def _bitplan() -> click.Command:
    from service.cli.main import app

    return typer.main.get_command(app)


def _ray() -> click.Command:
    found: click.Command = importlib.import_module("ray.scripts.scripts").cli
    return found


def _click_fault(command: Any, name: str, arguments: list[str]) -> str:
    """Parse as the program does, without running it."""
    try:
        while True:
            group = hasattr(command, "resolve_command")
            context = command.make_context(name, list(arguments))
            if not group:
                return ""
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            found, command, arguments = command.resolve_command(context, rest)
            name = str(found)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())


def _reference_fault(arguments: list[str], services: Mapping[str, Any]) -> str:
    """Applications that are named exist, and so do services that are addressed."""
    for argument in arguments:
        module, _, attribute = argument.partition(":")
        if re.fullmatch(r"[a-z.]+\.app:\w+", argument) and not hasattr(
            importlib.import_module(module), attribute
        ):
            return f"{module} has no {attribute}"
        if argument.startswith("--address="):
            host, _, port = argument.removeprefix("--address=").partition(":")
            if host not in services or f"--port={port}" not in services[host]["command"]:
                return f"nobody listens at {host}:{port}"
    return ""


def _python_fault(arguments: list[str]) -> str:
    try:
        compile(arguments[1], "<healthcheck>", "exec")
    except SyntaxError as error:
        return str(error)
    return "" if arguments[0] == "-c" and "/readyz" in arguments[1] else "it must ask /readyz"


def _options_fault(program: str, arguments: list[str]) -> str:
    if shutil.which(program) is None:
        return ""
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z-]+", told))
    unknown = [argument for argument in arguments if argument.partition("=")[0] not in known]
    return f"it has no {unknown[0]}" if unknown else ""
