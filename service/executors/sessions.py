"""Finding and calling the code that builds a session."""

import importlib
from collections.abc import Callable
from typing import Any, cast

from sensitivity.spec import SessionSpec
from service.executors.protocol import Session


def load(path: str) -> Callable[..., Any]:
    """The callable that "package.module:name" names. Raises ValueError when there is none."""
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ValueError(f"A callable must be written package.module:name. Got {path!r}.")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"{module} must have a callable {name!r}. Got {found!r}.")
    return cast(Callable[..., Any], found)


def build(path: str, spec: SessionSpec) -> Session:
    """A session from its factory."""
    return cast(Session, load(path)(spec))
