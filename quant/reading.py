"""Reading untrusted JSON: every error names the place as a JSON pointer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class ReadError(ValueError):
    """A document that does not have the promised shape."""


@dataclass(frozen=True)
class Node:
    """One value of a document and where it stands."""

    value: Any
    pointer: str = ""

    def error(self, must: str, step: str = "Correct the document.") -> ReadError:
        """The error for this place: what it must be and what it is."""
        got = repr(self.value)
        return ReadError(f"{self.pointer or '/'} must be {must}. Got {got[:80]}. {step}")

    def mapping(self) -> Mapping[str, Any]:
        """The value as an object."""
        if not isinstance(self.value, Mapping):
            raise self.error("an object")
        return self.value

    def fields(self, *names: str) -> dict[str, Node]:
        """The members of an object that has exactly these fields."""
        value = self.mapping()
        for name in names:
            if name not in value:
                raise ReadError(f"{self.pointer}/{name} must be given. Got no such field. Add it.")
        for name in value:
            if name not in names:
                raise ReadError(
                    f"{self.pointer}/{name} must be one of {', '.join(names)}. Got an unknown field. Drop it."
                )
        return {name: self.member(name) for name in names}

    def member(self, name: str) -> Node:
        """One member of an object."""
        escaped = name.replace("~", "~0").replace("/", "~1")
        return Node(self.mapping()[name], f"{self.pointer}/{escaped}")

    def members(self) -> Iterator[tuple[str, Node]]:
        """All members of an object."""
        for name in self.mapping():
            yield name, self.member(name)

    def items(self) -> Iterator[Node]:
        """The elements of an array."""
        if not isinstance(self.value, Sequence) or isinstance(self.value, str):
            raise self.error("an array")
        for index, item in enumerate(self.value):
            yield Node(item, f"{self.pointer}/{index}")

    def text(self) -> str:
        """The value as a string."""
        if not isinstance(self.value, str):
            raise self.error("a text")
        return self.value

    def integer(self, minimum: int = 0) -> int:
        """The value as an integer of at least `minimum`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < minimum:
            raise self.error(f"an integer of at least {minimum}")
        return self.value

    def number(self) -> float:
        """The value as a finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error("a number")
        try:
            value = float(self.value)
        except OverflowError:
            raise self.error("a number that fits in a float") from None
        if not math.isfinite(value):
            raise self.error("a finite number")
        return value

    def optional_integer(self) -> int | None:
        """An integer of at least 0, or null."""
        return None if self.value is None else self.integer()

    def optional_number(self) -> float | None:
        """A finite number, or null."""
        return None if self.value is None else self.number()

    def optional_text(self) -> str | None:
        """A string, or null."""
        return None if self.value is None else self.text()
