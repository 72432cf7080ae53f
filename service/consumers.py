"""Names of consumers that requests and commands give, and which door serves which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant import catalog

DOORS = (
    (
        catalog.CHECKPOINTS,
        "Run bitplan checkpoint MODEL_DIR PLAN --to {name} -o OUT, or POST /v1/plans/{{id}}/checkpoint.",
    ),
    (
        catalog.EXPORTERS,
        "Run bitplan export PLAN --to {name} -o DIR, or GET /v1/plans/{{id}}/exports/{name}.",
    ),
)


def consumer_fault(name: str, offered: Mapping[str, Any]) -> str | None:
    """What quant says about a name that is not `offered`, and the door of the other catalog that has it.

    >>> consumer_fault("gguf", catalog.EXPORTERS).partition("Got ")[2]
    "'gguf'. It takes weights. Run bitplan checkpoint MODEL_DIR PLAN --to gguf -o OUT, or POST /v1/plans/{id}/checkpoint."
    """  # noqa: E501
    fault = catalog.consumer_fault(name, offered)
    doors = [door.format(name=name) for having, door in DOORS if name in having]
    return " ".join([fault, *doors[:1]]) if fault else None


def require_consumer(name: str, offered: Mapping[str, Any]) -> None:
    """Raise ValueError with that fault."""
    fault = consumer_fault(name, offered)
    if fault:
        raise ValueError(fault)
