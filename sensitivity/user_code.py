"""Functions of the user's own, named `package.module:function`, found from the current directory.

Only for the user's own machine: nothing that came over HTTP may name one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quant.digest import file_digest
from sensitivity.errors import SessionError
from sensitivity.spec import UserMetric


def imported(location: str, what: str, wrong: type[SessionError]) -> Callable[..., Any]:
    """The function that `what` names. Raises `wrong` where there is none."""
    module_name, function_name = _parts(location, what, wrong)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise wrong(
            f"{what} module {module_name!r} must import. Got {type(error).__name__}: {error!s:.300}."
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise wrong(f"{what} module {module_name!r} must hold a function {function_name!r}. Got none.")
    return function


def user_metric(location: str) -> UserMetric:
    """The metric with the digest of its module's source, which is not imported. Raises ValueError."""
    module_name, _ = _parts(location, "user metric", SessionError)
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ValueError(
            f"user metric module {module_name!r} must be a file that Python can import from here. Got none. "
            "Run the command where the file is, or set PYTHONPATH."
        )
    return UserMetric(location, file_digest(Path(found.origin)))


def _parts(location: str, what: str, wrong: type[SessionError]) -> tuple[str, str]:
    module_name, _, function_name = location.partition(":")
    if not module_name or not function_name:
        raise wrong(f"{what} must be package.module:function. Got {location!r:.200}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return module_name, function_name
