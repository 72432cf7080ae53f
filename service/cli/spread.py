"""Options that several commands take together: one dataclass, spread over a command's own parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

Command = Callable[..., None]


def spread(command: Command) -> Command:
    """A command whose one parameter that is a dataclass is replaced by one option per field.

    The fields' annotations are typer's (`Annotated[..., typer.Option(...)]`), their defaults the options'.
    """
    hints = get_type_hints(command, include_extras=True)
    [name] = [name for name, hint in hints.items() if is_dataclass(hint)]
    group = hints[name]
    members = get_type_hints(group, include_extras=True)

    @wraps(command)
    def spread_command(**given: Any) -> None:
        found = {field.name: given.pop(field.name) for field in fields(group)}
        command(**{name: group(**found)}, **given)

    own = inspect.signature(command).parameters.values()
    parameters = [p.replace(annotation=hints[p.name]) for p in own if p.name != name]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=members[field.name]
        )
        for field in fields(group)
    ]
    spread_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    spread_command.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread_command
