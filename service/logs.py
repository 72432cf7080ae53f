"""Logs: one line per event on standard error, for people on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict

from service.access import KEY_MARK, redacted


def _without_keys(_: object, __: str, event: EventDict) -> EventDict:
    """No key gets into a log, wherever it was sent."""
    for name, value in event.items():
        if isinstance(value, str) and KEY_MARK in value:
            event[name] = redacted(value)
    return event


SHARED = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
    _without_keys,
)


def configure(level: str) -> None:
    """Send what is at least `level` (debug, info, warning, error) to standard error."""
    structlog.configure(
        processors=[*SHARED, _renderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=_standard_error,
        cache_logger_on_first_use=False,
    )


def adopt_libraries(level: str) -> None:
    """Say what libraries log in the same form, with the same ids; requests have their own line already."""
    handler = _ToStandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer()],
        )
    )
    root = logging.getLogger()
    root.handlers = [kept for kept in root.handlers if not isinstance(kept, _ToStandardError)] + [handler]
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True


class _ToStandardError(logging.Handler):
    """Writes to what standard error is now, as `_standard_error` does."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _renderer() -> structlog.types.Processor:
    return structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()


def _standard_error(*_: object) -> structlog.PrintLogger:
    """What standard error is now, not what it was when logs were configured."""
    return structlog.PrintLogger(sys.stderr)


def hush_libraries() -> None:
    """Leave out what torchao says when it is imported: kernels for GPUs that are not there, and the like."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
