"""What a key must be allowed to do for each operation: the one table, tested over every route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.access import Scope

OPEN = None
"""For whoever can connect: nothing of anybody is in the answer."""

SCOPES: Mapping[str, Scope | None] = {
    "healthz": OPEN,
    "readyz": OPEN,
    "prometheus": Scope.READ,
    "formats": Scope.READ,
    "metrics": Scope.READ,
    "solvers": Scope.READ,
    "objectives": Scope.READ,
    "tasks": Scope.READ,
    "runtimes": Scope.READ,
    "devices": Scope.READ,
    "limits": Scope.READ,
    "list_methods": Scope.READ,
    "list_consumers": Scope.READ,
    "list_checkpoint_consumers": Scope.READ,
    "create_upload": Scope.SUBMIT,
    "get_upload": Scope.READ,
    "abandon_upload": Scope.SUBMIT,
    "blob_offset": Scope.READ,
    "put_blob": Scope.SUBMIT,
    "patch_blob": Scope.SUBMIT,
    "complete_upload": Scope.SUBMIT,
    "create_model": Scope.SUBMIT,
    "list_models": Scope.READ,
    "get_model": Scope.READ,
    "get_layers": Scope.READ,
    "delete_model": Scope.SUBMIT,
    "make_calibration": Scope.SUBMIT,
    "create_calibration": Scope.SUBMIT,
    "list_calibrations": Scope.READ,
    "get_calibration": Scope.READ,
    "delete_calibration": Scope.SUBMIT,
    "submit": Scope.SUBMIT,
    "list_jobs": Scope.READ,
    "get_job": Scope.READ,
    "cancel": Scope.SUBMIT,
    "resume": Scope.SUBMIT,
    "delete": Scope.SUBMIT,
    "list_events": Scope.READ,
    "get_webhook": Scope.READ,
    "list_scores": Scope.READ,
    "get_frontier": Scope.READ,
    "correlate": Scope.SUBMIT,
    "get_correlations": Scope.READ,
    "list_plans": Scope.READ,
    "solve_again": Scope.SUBMIT,
    "get_plan": Scope.READ,
    "get_document": Scope.READ,
    "get_explanation": Scope.READ,
    "measure_plan": Scope.SUBMIT,
    "get_export": Scope.READ,
    "write_checkpoint": Scope.SUBMIT,
    "get_checkpoint": Scope.READ,
    "list_audit": Scope.ADMIN,
}


def scope_of(operation: str) -> Scope | None:
    """The scope that an operation needs. Raises LookupError for one that the table forgot."""
    if operation not in SCOPES:
        raise LookupError(
            f"Every operation must have a scope. Got {operation}, which has none. Add it to SCOPES in "
            "service/api/scopes.py."
        )
    return SCOPES[operation]


def with_security(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with the scope of each operation; `{}` stands for a server without keys."""
    document["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "bitplan_<12 hex digits>_<secret>",
            "description": "A key of the scope that the operation names, or a higher one: read, submit, "
            "admin. A server without keys answers its own machine without one.",
        }
    }
    for path in document["paths"].values():
        for operation in path.values():
            needed = scope_of(operation["operationId"])
            operation["security"] = [] if needed is OPEN else [{"key": [needed.value]}, {}]
    return document
