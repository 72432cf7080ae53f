"""How a job fails: every exception becomes one problem document."""

# ruff: noqa: N818 - an error is named after what went wrong

from collections.abc import Mapping
from typing import Any

import structlog

from service.errors import ServiceError, Unprocessable
from service.executors.protocol import Failure

log = structlog.get_logger()


class JobFailed(ServiceError):
    """The job cannot go on, and the reason is not what the user sent."""

    status, title = 500, "Job failed"


SLUGS: Mapping[str, str] = {
    "worker_crash": "worker-crash",
    "out_of_memory": "out-of-memory",
    "bad_input": "bad-input",
    "unit_error": "unit-error",
    "not_isolated": "not-isolated",
}


def problem_of(error: BaseException) -> dict[str, Any]:
    """The problem document of an exception; an unexpected one is logged with its trace and told by its
    name.
    """
    if isinstance(error, ServiceError):
        return error.as_json()
    log.error("job.unexpected_error", exc_info=error)
    detail = f"The job must run without an unexpected error. Got {type(error).__name__}: {error}"
    return JobFailed("internal-error", f"{detail}. Look into the runner's log.").as_json()


def problem_of_failure(failure: Failure, unit: Mapping[str, Any], attempts: int = 1) -> ServiceError:
    """The error that ends a job whose unit cannot be measured; it names the layer and the scheme, if it has
    them.
    """
    names = {name: unit[name] for name in ("layer", "scheme", "metric", "block", "part") if name in unit}
    kind = str(failure.detail.get("error", ""))
    stable = kind if kind.islower() else ""
    extra = {**names, "attempts": attempts, "failure": failure.as_json()}
    if failure.kind == "bad_input" or stable:
        slug = (stable or SLUGS[failure.kind]).replace("_", "-")
        return Unprocessable(slug, failure.message, extra=extra)
    where = ", ".join(f"{name} {value}" for name, value in names.items())
    message = f"{failure.message} ({where})" if where else failure.message
    return JobFailed(SLUGS[failure.kind], message, extra=extra)
