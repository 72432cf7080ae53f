"""Settings of every Bitplan process: defaults, then environment variables that start with BITPLAN_, or the
files that variables name.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from search.budget import parse_bytes
from service.secret_files import SecretFiles, named_files
from service.webhooks.guard import parse_destination

PREFIX = "BITPLAN_"
HUB_ENDPOINT = "https://huggingface.co"


def default_data_dir() -> Path:
    """Where blobs, logs and the SQLite file live unless told otherwise."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "bitplan"


def default_ray_cache() -> Path:
    """Where a node of a Ray cluster keeps models unless told otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "bitplan" / "ray"


def default_workers() -> int:
    """One worker per usable core, at most four."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 4)


def default_hub_endpoint() -> str:
    """Where the libraries of the hub look too."""
    return os.environ.get("HF_ENDPOINT") or HUB_ENDPOINT


def hub_is_offline() -> bool:
    """Whether the environment forbids the hub, with the variables and values that its libraries know."""
    yes = ("1", "on", "yes", "true")
    return any(os.environ.get(name, "").lower() in yes for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


class Settings(BaseSettings):
    """What an operator may choose.

    ``BITPLAN_DATA_DIR``, ``BITPLAN_DATABASE_URL`` and so on set the fields of the same name;
    ``BITPLAN_DATABASE_URL_FILE`` names a file that holds the value (docs/deployment.md). `database_password`
    becomes part of `database_url`.
    `model_folders` is an allow-list, separated like PATH. `webhook_networks` ("10.0.0.0/8,127.0.0.1/32") are
    networks beside the public ones that webhooks may go to. `memory_limit` ("2 GiB") holds for each worker
    that measures (searches, correlations, evidence, evaluation). The lease must outlive at least two
    heartbeats.
    `isolation` and the `worker_...` limits confine each worker process (docs/executors.md): bytes of memory
    ("": the machine's) and of a file, hours of CPU per unit and thread, processes and threads; 0 is no limit.
    `worker_closed` are files and folders that workers cannot open, separated like PATH; the files that
    settings were read from are always among them.
    The `ray_...` fields are for the executor "ray" (docs/executors.md): `ray_address` (host:port of its
    head), `ray_auth`, `ray_token_file`, `ray_gpus_per_worker`, `ray_shared_store` and `ray_patience_seconds`
    of the runner, `ray_cache` and `ray_cache_limit` ("200 GiB"; "": until the disk is full) of each node.
    `access`: "auto" asks for keys as soon as one was made, "keys" always, "open" never. Rates and quotas hold
    for requests with a key, `rate_limit` in requests per second and key; 0 is no limit. A tenant may have
    quotas of its own instead.

    `hub` opens models of a hub by pinned commit (docs/ingest.md): at `hub_endpoint`, whose files may lie at
    `hub_hosts`, with `hub_token`, each within `hub_hours`; never while `hub_offline`.

    Retention (docs/operations.md): finished jobs go after `keep_jobs_days` without use (0: never), logs of
    workers, uploads that stand still and idempotency keys after theirs, rows of complete uploads and deleted
    inputs after `keep_done_days`, the audit log after `keep_audit_days` (0: never, both), files that nothing
    refers to after `unreferenced_hours`; runners collect every `gc_interval_hours` (0: only ``bitplan gc``
    does). With less than `least_free_bytes` on the disk of the store the service says that it is not ready.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    data_dir: Path = Field(default_factory=default_data_dir)
    database_url: str = Field(default="", repr=False)
    database_password: str = Field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default_factory=default_workers, ge=1, le=256)
    executor: str = "local_pool"
    session_factory: str = "sensitivity.session:Session"
    lease_seconds: float = Field(default=60.0, gt=0)
    heartbeat_seconds: float = Field(default=15.0, gt=0)
    poll_seconds: float = Field(default=1.0, gt=0)
    grace_seconds: float = Field(default=10.0, ge=0)
    max_streams: int = Field(default=5000, ge=1)
    max_streams_per_client: int = Field(default=200, ge=1)
    max_upload_bytes: int = Field(default=64 * 2**30, gt=0)
    model_folders: Annotated[tuple[Path, ...], NoDecode] = ()
    webhook_networks: Annotated[tuple[str, ...], NoDecode] = ()
    hub: bool = False
    hub_endpoint: str = Field(default_factory=default_hub_endpoint)
    hub_hosts: Annotated[tuple[str, ...], NoDecode] = ("*.hf.co", "*.huggingface.co")
    hub_token: str = Field(default="", repr=False)
    hub_offline: bool = Field(default_factory=hub_is_offline)
    hub_hours: float = Field(default=24.0, gt=0, allow_inf_nan=False)
    memory_limit: str = ""
    isolation: Literal["require", "prefer", "off"] = "prefer"
    worker_memory: str = ""
    worker_file: str = "1 TiB"
    worker_cpu_hours: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    worker_processes: int = Field(default=1024, ge=0)
    worker_closed: Annotated[tuple[Path, ...], NoDecode] = ()
    ray_address: str = ""
    ray_auth: Literal["token", "disabled"] = "token"
    ray_token_file: str = ""
    ray_gpus_per_worker: float = Field(default=1.0, gt=0, le=8, allow_inf_nan=False)
    ray_shared_store: bool = False
    ray_patience_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    ray_cache: Path = Field(default_factory=default_ray_cache)
    ray_cache_limit: str = ""
    access: Literal["auto", "keys", "open"] = "auto"
    rate_limit: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    rate_burst: int = Field(default=200, ge=1)
    quota_jobs: int = Field(default=1000, ge=0)
    quota_bytes: str = "256 GiB"
    quota_running: int = Field(default=0, ge=0)
    keep_jobs_days: float = Field(default=0.0, ge=0)
    keep_logs_days: float = Field(default=14.0, ge=1)
    keep_uploads_days: float = Field(default=7.0, ge=1)
    keep_keys_days: float = Field(default=7.0, ge=1)
    keep_done_days: float = Field(default=30.0, ge=0)
    keep_audit_days: float = Field(default=0.0, ge=0)
    unreferenced_hours: float = Field(default=24.0, ge=1)
    gc_interval_hours: float = Field(default=1.0, ge=0)
    least_free_bytes: int = Field(default=256 * 2**20, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win; then files, then the environment, which never have both."""
        return init_settings, SecretFiles(settings_cls, PREFIX), env_settings

    @field_validator("data_dir", "ray_cache")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("model_folders", "worker_closed", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("webhook_networks", "hub_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return (
            tuple(part.strip().lower() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("webhook_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value

    @field_validator("hub_endpoint")
    @classmethod
    def _is_endpoint(cls, value: str) -> str:
        parse_destination(value)
        return value.rstrip("/")

    @field_validator("memory_limit", "worker_memory", "worker_file", "quota_bytes", "ray_cache_limit")
    @classmethod
    def _amount(cls, value: str) -> str:
        if value:
            parse_bytes(value)
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> "Settings":
        if not self.database_url:
            object.__setattr__(self, "database_url", f"sqlite:///{self.data_dir / 'bitplan.db'}")
        if self.database_password:
            url = _with_password(self.database_url, self.database_password)
            object.__setattr__(self, "database_url", url)
            object.__setattr__(self, "database_password", "")
        files = named_files((_variable(name) for name in type(self).model_fields), os.environ).values()
        closed = dict.fromkeys((*self.worker_closed, *(file.absolute() for file in files)))
        object.__setattr__(self, "worker_closed", tuple(closed))
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                "heartbeat_seconds must be at most half of lease_seconds. "
                f"Got {self.heartbeat_seconds} and {self.lease_seconds}. Raise BITPLAN_LEASE_SECONDS."
            )
        return self

    @property
    def quotas(self) -> dict[str, int]:
        """What a tenant without quotas of its own may have; 0 is no limit."""
        kept = parse_bytes(self.quota_bytes) if self.quota_bytes else 0
        return {"jobs": self.quota_jobs, "bytes": kept, "running": self.quota_running}

    def as_environment(self) -> dict[str, str]:
        """The environment variables that give another process these same settings; those that name files are
        emptied.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name in ("model_folders", "worker_closed"):
            values[name] = os.pathsep.join(str(place) for place in values[name])
        values["webhook_networks"] = ",".join(self.webhook_networks)
        values["hub_hosts"] = ",".join(self.hub_hosts)
        given = {_variable(name): str(value) for name, value in values.items()}
        return given | {f"{name}_FILE": "" for name in named_files(given, os.environ)}


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _with_password(url: str, password: str) -> str:
    """The URL of a PostgreSQL database with its password. Raises ValueError, which repeats neither."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or not parsed.drivername.startswith("postgres"):
        raise ValueError(
            "database_url must be that of a PostgreSQL database where database_password is given. Got "
            f"{'no URL' if parsed is None else parsed.drivername}. Set BITPLAN_DATABASE_URL to "
            "postgresql://user@host/database."
        )
    if parsed.password:
        raise ValueError(
            "database_url must have no password where database_password is given. Got one in both. "
            "Leave it out of BITPLAN_DATABASE_URL."
        )
    return parsed.set(password=password).render_as_string(hide_password=False)
