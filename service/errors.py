"""What the service says when it cannot do what was asked: one exception tree, one JSON form (RFC 9457).

    ServiceError            500
      BadRequest            400
      Unauthorized          401
      Forbidden             403
      NotFound              404
      RequestTimeout        408
      Conflict              409
      PreconditionFailed    412
      TooLarge              413
      UnsupportedFile       415
      Unprocessable         422
      TooMany               429
      Unavailable           503
      InsufficientStorage   507

The class carries the HTTP status, the instance a `slug` that names the kind of problem and never changes,
and a `detail` of the form "X must be .... Got .... <next step>".
"""

# ruff: noqa: N818 - an error is named after what went wrong

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

PROBLEM_TYPE = "urn:bitplan:problem:"
MEDIA_TYPE = "application/problem+json"


class ServiceError(Exception):
    """A problem that a client can read.

    >>> NotFound("job-not-found", "No job job_1. List them at /v1/jobs.").as_json()["type"]
    'urn:bitplan:problem:job-not-found'
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        pointer: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.slug, self.detail, self.pointer = slug, detail, pointer
        self.extra: dict[str, Any] = dict(extra or {})
        self.headers: dict[str, str] = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """The problem document, without the members that only a response has (`instance`)."""
        document: dict[str, Any] = {
            "type": PROBLEM_TYPE + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.pointer is not None:
            document["pointer"] = self.pointer
        return document | self.extra


class BadRequest(ServiceError):
    """The request itself cannot be read."""

    status, title = 400, "Bad request"


class Unauthorized(ServiceError):
    """There is no key, or none that is good."""

    status, title = 401, "Unauthorized"


class Forbidden(ServiceError):
    """The peer or its key may not do this."""

    status, title = 403, "Forbidden"


class NotFound(ServiceError):
    """There is no such thing, or it belongs to someone else."""

    status, title = 404, "Not found"


class RequestTimeout(ServiceError):
    """The body came too slowly."""

    status, title = 408, "Request timeout"


class Conflict(ServiceError):
    """The request is sound, the state of the resource is not the one it needs."""

    status, title = 409, "Conflict"


class PreconditionFailed(ServiceError):
    """An If-Match did not match."""

    status, title = 412, "Precondition failed"


class TooLarge(ServiceError):
    """More bytes than declared or than the server accepts."""

    status, title = 413, "Too large"


class UnsupportedFile(ServiceError):
    """A kind of file that is never read here."""

    status, title = 415, "Unsupported file"


class Unprocessable(ServiceError):
    """The request was understood and is wrong."""

    status, title = 422, "Unprocessable"


class TooMany(ServiceError):
    """More at a time, or in a while, than one client or the service allows."""

    status, title = 429, "Too many"


class Unavailable(ServiceError):
    """Not now: a dependency is missing or busy."""

    status, title = 503, "Unavailable"


class InsufficientStorage(ServiceError):
    """The disk, or the tenant's part of it, is full."""

    status, title = 507, "Insufficient storage"


def json_pointer(*parts: str | int) -> str:
    """The RFC 6901 pointer to a member, as used in `pointer`.

    >>> json_pointer("pins", "a/b~c", 0)
    '/pins/a~1b~0c/0'
    """
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def slug_of(problem: Mapping[str, Any]) -> str:
    """The inverse of the `type` member: the slug of a problem document.

    >>> slug_of({"type": "urn:bitplan:problem:invalid-path"})
    'invalid-path'
    """
    return str(problem.get("type", "")).removeprefix(PROBLEM_TYPE)
