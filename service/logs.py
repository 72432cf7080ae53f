"""Logs: one line per event on standard error, for people on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict

from service.access import redacted


def configure(level: str) -> None:
    """Send what is at least `level` (debug, info, warning, error) to standard error."""
    on_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _without_keys,
            structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=_standard_error,
        cache_logger_on_first_use=False,
    )
    for name in ("uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).addFilter(_hide_keys)


def _standard_error(*_: object) -> structlog.PrintLogger:
    """What standard error is now, not what it was when logs were configured."""
    return structlog.PrintLogger(sys.stderr)


def hush_libraries() -> None:
    """Leave out what torchao says when it is imported: kernels for GPUs that are not there, and the like."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _without_keys(_: object, __: str, event: EventDict) -> EventDict:
    """No key gets into a log, wherever it was sent."""
    return {name: redacted(value) if isinstance(value, str) else value for name, value in event.items()}


def _hide_keys(record: logging.LogRecord) -> bool:
    """The same for the lines of the HTTP server, which show query strings."""
    if isinstance(record.args, tuple):
        record.args = tuple(redacted(part) if isinstance(part, str) else part for part in record.args)
    return True
