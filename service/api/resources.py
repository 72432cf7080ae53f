"""What answers look like: the rules for all, pages, and the inputs of a job, made from records."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.records import (
    CalibrationRecord,
    ModelRecord,
    UploadRecord,
)

Item = TypeVar("Item")
Json = dict[str, Any]


class Resource(BaseModel):
    """The rules that hold for every answer."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Page(Resource, Generic[Item]):
    """Some items of a list; the next page begins behind `next_cursor`."""

    items: list[Item]
    next_cursor: str | None = Field(None, description="null on the last page.")


class Blob(Resource):
    """A file content that has not arrived."""

    sha256: str
    size: int = Field(description="Bytes.")


class Upload(Resource):
    """Files that become a model or a calibration set when all have arrived."""

    id: str
    purpose: str
    state: str = Field(description="open, complete")
    files: list[Json]
    missing: list[Blob] = Field(description="What to send to /v1/uploads/{id}/blobs/{sha256}.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: UploadRecord, missing: list[Blob]) -> Upload:
        """From the record and the blobs that have not arrived."""
        return cls(
            id=record.id,
            purpose=record.purpose,
            state=record.state,
            files=[dict(file) for file in record.manifest],
            missing=missing,
            created_at=record.created_at,
            links=links_of(f"/v1/uploads/{record.id}", "complete"),
        )


class Model(Resource):
    """A model that was sent."""

    id: str
    state: str = Field(description="verifying, ready, rejected, deleted")
    digest: str = Field(description="SHA-256 over the names and digests of its files.")
    source: Json
    summary: Json | None = Field(description="What the files and, when ready, a worker say about it.")
    problem: Json | None = Field(description="Why it was rejected.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: ModelRecord) -> Model:
        """From the record."""
        return cls(
            id=record.id,
            state=record.state,
            digest=record.digest,
            source=dict(record.source),
            summary=without_inventory(record.summary),
            problem=as_json(record.problem),
            created_at=record.created_at,
            links=links_of(f"/v1/models/{record.id}", "layers"),
        )


class Layers(Resource):
    """What of a model can be quantized, and what was left out and why."""

    layers: list[Json]
    excluded: list[Json]
    caches: list[str] = Field(
        [], description="Attention layers whose key-value caches can be decided: see kv_cache of a job."
    )
    total_parameters: int | None = None
    other_bytes: int | None = None


class Calibration(Resource):
    """A calibration set that was sent."""

    id: str
    state: str = Field(description="verifying, ready, rejected, deleted")
    kind: str = Field(description="safetensors, npz, text, jsonl")
    digest: str
    source: Json
    summary: Json | None
    problem: Json | None
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, record: CalibrationRecord) -> Calibration:
        """From the record."""
        return cls(
            id=record.id,
            state=record.state,
            kind=record.kind,
            digest=record.digest,
            source=dict(record.source),
            summary=as_json(record.summary),
            problem=as_json(record.problem),
            created_at=record.created_at,
            links=links_of(f"/v1/calibrations/{record.id}"),
        )


def as_json(value: Mapping[str, Any] | None) -> Json | None:
    """A plain dict, which pydantic takes."""
    return None if value is None else dict(value)


def without_inventory(value: Mapping[str, Any] | None) -> Json | None:
    """Without the inventory, which /v1/models/{id}/layers has and which is long."""
    return None if value is None else {name: item for name, item in value.items() if name != "inventory"}


def items_of(catalog: Mapping[str, Any], *members: str) -> Json:
    """The entries of a catalog as a list answers them, each with some of its members."""
    return {"items": [{name: getattr(entry, name) for name in members} for entry in catalog.values()]}


def links_of(path: str, *parts: str) -> dict[str, str]:
    """The paths of a resource and of what is below it."""
    return {"self": path} | {part: f"{path}/{part}" for part in parts}
