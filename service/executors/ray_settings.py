"""Which Ray cluster an executor uses, and how much of it. Front: no ray."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from search.budget import parse_bytes
from service.settings import Settings


@dataclass(frozen=True)
class RaySettings:
    """What the operator chose (docs/executors.md).

    address           host:port of the cluster's head
    auth              "token": only with the cluster's token; "disabled": anybody who connects may run code
    token_file        holds the token; "" for where Ray itself looks for it
    gpus_per_worker   of sessions on CUDA: 1 is a whole device, 0.5 half of one
    shared_store      nodes have the data directory at the same place: nothing is sent to them
    patience_seconds  how long a cluster that does not answer is tried before the job is given back
    memory_bytes      of each worker; None for the memory of its node
    """

    address: str = ""
    auth: Literal["token", "disabled"] = "token"
    token_file: str = ""
    gpus_per_worker: float = 1.0
    shared_store: bool = False
    patience_seconds: float = 60.0
    memory_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `as_json` wrote."""
        return cls(**value)


def ray_of(settings: Settings) -> RaySettings:
    """The part of the settings that is about Ray."""
    return RaySettings(
        address=settings.ray_address,
        auth=settings.ray_auth,
        token_file=settings.ray_token_file,
        gpus_per_worker=settings.ray_gpus_per_worker,
        shared_store=settings.ray_shared_store,
        patience_seconds=settings.ray_patience_seconds,
        memory_bytes=parse_bytes(settings.worker_memory) if settings.worker_memory else None,
    )


def ray_lacks(settings: Settings) -> str | None:
    """Why the executor "ray" cannot be used with these settings; None where it can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray must be installed for BITPLAN_EXECUTOR=ray. Got no ray. Run: pip install 'bitplan[ray]'."
    host, _, port = settings.ray_address.rpartition(":")
    if not host or not port.isdigit():
        return (
            "BITPLAN_RAY_ADDRESS must be host:port of the cluster's head for BITPLAN_EXECUTOR=ray. Got"
            f" {settings.ray_address!r}. Start one with `ray start --head --port=6379`, and name it."
        )
    if settings.ray_token_file and not Path(settings.ray_token_file).is_file():
        return (
            f"BITPLAN_RAY_TOKEN_FILE must hold the cluster's token. Got no file {settings.ray_token_file}."
            " Make one with `ray get-auth-token --generate`, the same on every node."
        )
    return None
