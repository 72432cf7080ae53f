"""The route class of what clients poll: "nothing new" is answered before FastAPI reads the request.

Most polls find nothing new. Then one small statement, which all polls of the moment share, is the whole work:
no row is read, no parameter parsed, nothing built.
"""

from __future__ import annotations

import re

from fastapi import Request, Response

from service.api.conditional import matches, not_modified
from service.api.context import CONTEXT, Context
from service.api.guarded import Guarded, Handler
from service.records import JobRecord, VersionRecord

RETRY_SECONDS = "1"
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""What a statement that is shared with others may be asked for: nothing that could make it fail."""


class Polled(Guarded):
    """A route of ``{job_id}`` whose ETag is `etag_of` the job."""

    def operation(self) -> Handler:
        """304 where the client has the present version of the job; else FastAPI's handler."""
        handler = super().operation()

        async def polled(request: Request) -> Response:
            return await _unchanged(request) or await handler(request)

        return polled


async def _unchanged(request: Request) -> Response | None:
    """The answer 304, or None: for a job that is not there or another tenant's, too."""
    context: Context = request.scope[CONTEXT]
    known, job_id = request.headers.get("if-none-match"), request.path_params["job_id"]
    if known is None or "prefer" in request.headers or not _PLAIN_ID.fullmatch(job_id):
        return None
    job = await context.versions.get(job_id)
    if job is None or job.tenant != context.tenant or not matches(etag_of(job), known):
        return None
    return not_modified(etag_of(job), retry_headers(job))


def etag_of(job: JobRecord | VersionRecord) -> str:
    """Changes with every visible change of the job."""
    return f'"{job.id}-{job.version}"'


def retry_headers(job: JobRecord | VersionRecord) -> dict[str, str]:
    """When to ask again, while there is something to wait for."""
    return {} if job.finished else {"Retry-After": RETRY_SECONDS}
