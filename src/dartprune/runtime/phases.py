"""What the user says of forwards: `phase` for direct calls, `dense` for a pause, and which threads that reaches."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from dartprune.model.rows import Phase

Explicit = tuple[
    Phase, tuple[int, ...] | None
]  # what the tokens of a direct call are, and its lines' slots where given


@dataclass
class Generation:
    """One call of `generate()`; it may lie inside another one.

    prompt: tokens of the text it was given, None if that is not known.  begun: whether its text was read.
    ended: lines that are over, bool [B].
    """

    prompt: int | None
    begun: bool = False
    ended: Tensor | None = None


class Phases:
    """A phase belongs to the thread that set it; a pause to that thread and to those that were started inside it."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._pauses: list[_Pause] = []

    @property
    def here(self) -> Explicit | None:
        """What this thread says of its direct calls."""
        return getattr(self._local, "explicit", None)

    @property
    def paused(self) -> bool:
        """Whether pruning is paused for this thread."""
        return any(pause.reaches_here() for pause in self._pauses)

    @contextmanager
    def say(self, explicit: Explicit) -> Iterator[None]:
        """Inside, this thread's direct calls are that."""
        before, self._local.explicit = self.here, explicit
        try:
            yield
        finally:
            self._local.explicit = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, pruning rests."""
        pause = _Pause()
        self._pauses.append(pause)
        try:
            yield
        finally:
            self._pauses.remove(pause)


class _Pause:
    def __init__(self) -> None:
        self._owner = threading.current_thread()
        # all others that run by now go on as they are; a thread that starts later was started inside the block
        self._others = weakref.WeakSet(threading.enumerate())
        self._others.discard(self._owner)

    def reaches_here(self) -> bool:
        return threading.current_thread() not in self._others
