"""One method replaced on an object and put back, and what may not be copied meanwhile."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

from torch import nn

Forward = Callable[..., Any]


class Refuses:
    """Holds references into a live model, so it can be neither copied nor pickled while it does."""

    @property
    def in_use(self) -> bool:
        """Whether it is at work."""
        return True

    def _refuse(self) -> NoReturn:
        raise RuntimeError("the model is attached to a pruner and cannot be copied or pickled: call run.detach() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.in_use:
            self._refuse()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.in_use:
            self._refuse()
        return super().__reduce_ex__(protocol)


class Patch:
    """One method of one object, replaced on the instance and put back.

    original: what the replacement passes on to.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.original: Callable[..., Any] | None = None
        self._had_own = False
        self._own: Any = None
        self._replacement: Any = None

    @property
    def outermost(self) -> bool:
        """Whether the replacement is what stands there now."""
        return bool(self.owner.__dict__.get(self.name) == self._replacement)

    @property
    def in_force(self) -> bool:
        """Whether a call still reaches the replacement, by itself or through what was put around it."""
        return self.outermost or any(part == self._replacement for part in _behind(self.owner, self.name))

    def install(self, replacement: Callable[..., Any]) -> Callable[..., Any] | None:
        """Replace; returns what was there (None if nothing was)."""
        self._had_own = self.name in self.owner.__dict__
        self._own = self.owner.__dict__.get(self.name)
        self.original = getattr(self.owner, self.name, None)
        setattr(self.owner, self.name, replacement)
        self._replacement = replacement
        return self.original

    def remove(self) -> bool:
        """Put back what was there; False where others have put something around it or in its place, which stays."""
        if self.outermost:
            if self._had_own:
                setattr(self.owner, self.name, self._own)
            else:
                delattr(self.owner, self.name)
            return True
        # what others keep on the owner, to be put back by them later, must not be our replacement
        for key, value in list(self.owner.__dict__.items()):
            if isinstance(value, Callable) and value == self._replacement:  # type: ignore[arg-type]
                self.owner.__dict__[key] = self.original
        return False


def _behind(owner: Any, name: str) -> Iterator[Any]:
    """The functions that a method of an object is made of: what it wraps, binds or encloses."""
    todo, seen = [getattr(owner, name, None)], set[int]()
    if hasattr(owner, "_hf_hook"):
        todo.append(owner.__dict__.get("_old_forward"))  # where accelerate keeps what its hook calls
    while todo and len(seen) < 200:
        part = todo.pop()
        if not callable(part) or isinstance(part, (nn.Module, type)) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        todo.append(getattr(part, "_torchdynamo_orig_callable", None))
        if isinstance(part, functools.partial):
            todo += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            todo.append(part.__func__)
        elif isinstance(part, types.FunctionType):
            for cell in part.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    todo.append(cell.cell_contents)
