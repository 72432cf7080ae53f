"""Every error answer is application/problem+json (RFC 9457); nothing of the inside gets out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException

from service.api.headers import HEADERS
from service.api.requests import HEADER, SCOPE_KEY
from service.errors import (
    MEDIA_TYPE,
    BadRequest,
    NotFound,
    ServiceError,
    Unavailable,
    Unprocessable,
    json_pointer,
)
from service.passing import disk_problem

log = structlog.get_logger(__name__)

_HTTP_SLUGS: Mapping[int, tuple[str, str, str]] = {
    400: ("invalid-json", "Bad request", "The body must be JSON, of few levels and of numbers that fit."),
    404: ("not-found", "Not found", "The path must be one of those at /docs."),
    405: ("method-not-allowed", "Method not allowed", "The method must be one of those that the path takes."),
    413: ("too-large", "Too large", "The body must be smaller. Send files through /v1/uploads."),
    415: ("unsupported-media-type", "Unsupported media type", "The body must be application/json."),
}


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    pointer: str | None = None
    instance: str | None = None


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "The request is wrong.",
        "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    },
    503: {"description": "Not now: Retry-After says when to ask again. A problem document."},
    507: {"description": "The disk, or the tenant's part of it, is full. A problem document."},
}


class _UnexpectedError(ServiceError):
    """Hides the exception that nobody foresaw."""


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(DataError, _not_storable)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(InterfaceError, _database_error)
    app.add_exception_handler(NoConnection, _database_error)
    app.add_exception_handler(OSError, _disk_error)
    app.add_exception_handler(Exception, _unexpected)


def respond(request: Request, error: ServiceError) -> JSONResponse:
    """The answer for a problem."""
    body = error.as_json() | {"instance": request.url.path}
    return JSONResponse(body, status_code=error.status, headers=error.headers, media_type=MEDIA_TYPE)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return respond(request, error)


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return respond(request, invalid_request(error.errors()))


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    slug, title, must = _HTTP_SLUGS.get(error.status_code, ("http-error", "HTTP error", str(error.detail)))
    detail = f"{must} Got {request.method} {request.url.path[:200]}."
    body = {
        "type": NotFound(slug, detail).as_json()["type"],
        "title": title,
        "status": error.status_code,
        "detail": detail,
        "instance": request.url.path,
    }
    return JSONResponse(body, status_code=error.status_code, headers=error.headers, media_type=MEDIA_TYPE)


async def _not_storable(request: Request, error: Exception) -> JSONResponse:
    """PostgreSQL compares and stores no text with a NUL, and no number beyond its types."""
    log.warning("value that the database cannot hold", path=request.url.path, exc_info=error)
    detail = (
        "Ids and names must be text without NUL characters. Got a value that no database holds. Correct it."
    )
    return respond(request, Unprocessable("invalid-text", detail))


async def _database_error(request: Request, error: Exception) -> JSONResponse:
    log.error("database error", path=request.url.path, exc_info=error)
    detail = "The database must answer. Got an error from it. Try again in a few seconds."
    return respond(request, Unavailable("database-unavailable", detail, headers={"Retry-After": "5"}))


async def _disk_error(request: Request, error: Exception) -> JSONResponse:
    """Raises what is no fault of the disk."""
    problem = disk_problem(error) if isinstance(error, OSError) else None
    if problem is None:
        raise error
    log.error("disk error", path=request.url.path, exc_info=error)
    return respond(request, problem)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """Answered outside of `Requests`, whose id therefore comes with the request."""
    ident = str(request.scope.get(SCOPE_KEY))
    log.error("unexpected error", request_id=ident, path=request.url.path, exc_info=error)
    detail = "The request must not fail like this. Got an unexpected error, which is in the log. Report it."
    return respond(request, _UnexpectedError("internal-error", detail, headers={**HEADERS, HEADER: ident}))


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    """One problem for all faults that validation found; the first one gives slug, detail and pointer."""
    if errors and errors[0]["type"] == "json_invalid":
        reason = str(errors[0].get("ctx", {}).get("error", "a syntax error"))
        return BadRequest("invalid-json", f"The body must be JSON. Got {reason}. Check its syntax.")
    faults = [
        {"pointer": _pointer(fault["loc"]), "detail": _detail(fault), "type": _slug(fault)}
        for fault in errors[:50]
    ]
    first = faults[0]
    return Unprocessable(first["type"], first["detail"], pointer=first["pointer"], extra={"errors": faults})


def _slug(fault: Mapping[str, Any]) -> str:
    """Faults of `service.wire` name their own slug, with a dash; pydantic's kinds have none."""
    return str(fault["type"]) if "-" in fault["type"] else "invalid-request"


def _pointer(location: Sequence[str | int]) -> str:
    return json_pointer(*(location[1:] if location[:1] == ("body",) else location))


def _detail(fault: Mapping[str, Any]) -> str:
    message = str(fault["msg"])
    if "-" in fault["type"]:
        return message
    where = ".".join(str(part) for part in fault["loc"][1:]) or "The body"
    if fault["type"] == "missing":
        return f"{where} must be given. Got nothing. Add it."
    if fault["type"] == "extra_forbidden":
        return f"{where} must be left out: no such member. Got it. Check its spelling at /docs."
    rule = message.removeprefix("Input should ").removeprefix("Value error, ")
    shown = repr(fault.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{where} must {rule}. Got {shown}. Correct it and send the request again."
