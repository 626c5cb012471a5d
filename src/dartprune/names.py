"""Names of registered parts, and errors that point to the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

from dartprune.errors import UserError

T = TypeVar("T")


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that nothing is registered under, with the nearest one that is.

    Args:
        kind: what was looked for, in the singular ("scorer").
        name: the name that was given.
        known: every name that would have been right.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names) or 'none'}")


def comma_list(text: str) -> list[str]:
    """The parts of a list with commas between them, without blanks and empty parts: `"a, b"` -> `["a", "b"]`."""
    return [part.strip() for part in text.split(",") if part.strip()]


class Registry(Generic[T]):
    """Values by name; a second registration under a name is refused."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Add a value; ValueError if the name is taken."""
        if name in self._values:
            raise UserError(f"{self.kind} {name!r} is registered already: choose another name")
        self._values[name] = value
        return value

    def get(self, name: str) -> T:
        """The value under a name; ValueError naming the nearest name otherwise."""
        try:
            return self._values[name]
        except KeyError:
            raise unknown(self.kind, name, self._values) from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._values)

    def name_of(self, value: T) -> str:
        """The name a value is registered under; ValueError if it is not."""
        for name, registered in self._values.items():
            if registered is value:
                return name
        raise ValueError(f"{value!r} is not a registered {self.kind}: register it first")
