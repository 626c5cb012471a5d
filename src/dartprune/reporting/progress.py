"""How far long work has come, on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY = 30.0  # seconds between lines where there is no terminal
Advance = Callable[[int], None]  # is told of so many more parts that are done


class Watcher(Protocol):
    """Is told how far work of many units has come; `Bar` is one."""

    def expect(self, parts: int, /) -> None:
        """So many more parts are to be done than was known."""

    def step(self, label: str, parts: int, /) -> None:
        """So many more parts of what `label` says are done."""


class Bar:
    """Work under way; call it with each further part that is done.

    total: parts of the whole, None where nobody knows; may grow.
    """

    spoke = time.monotonic()  # when the last line was printed, of whatever bar: many short ones are long work too

    def __init__(self, text: str, total: int | None, shown: Progress | None, *, silent: bool) -> None:
        self.text, self.total, self.done = text, total, 0
        self._silent, self._began = silent, time.monotonic()
        self._first: tuple[float, int] | None = None
        self._shown = shown
        self._task = None if shown is None else shown.add_task(text, total=total, visible=total != 0)

    def __call__(self, parts: int) -> None:
        """So many more parts are done."""
        self.reach(self.done + parts)

    def expect(self, parts: int) -> None:
        """So many more parts are to be done."""
        self.total = (self.total or 0) + parts
        self.reach(self.done)

    def step(self, text: str, parts: int) -> None:
        """So many more parts are done, and this is at work."""
        self.reach(self.done + parts, text=text)

    def tell(self, text: str) -> None:
        """This is at work now."""
        self.reach(self.done, text=text)

    def reach(self, done: int, *, total: int | None = None, text: str | None = None) -> None:
        """So many parts are done, of `total` and by the work `text` if these have changed; fewer begin anew."""
        if done < self.done:
            self._began, self._first = time.monotonic(), None
        elif done > self.done and self._first is None:
            self._first = time.monotonic(), done
        self.done, self.total, self.text = done, total or self.total, text or self.text
        if self._shown is not None and self._task is not None:
            self._shown.update(
                self._task, description=self.text, completed=done, total=self.total, visible=self.total != 0
            )
        elif not self._silent and time.monotonic() - Bar.spoke >= EVERY:
            Bar.spoke = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        spent = time.monotonic() - self._began
        line = f"{self.text}: {_clock(spent)} so far"
        if self.total is None:
            return line
        return f"{line}, {self.done} of {self.total}{self._left(self.total)}"

    def _left(self, total: int) -> str:
        """How long the rest may take; the first parts tell nothing, for they may have waited for a compiler."""
        if self._first is None or self.done == self._first[1]:
            return ""
        began, first = self._first
        return f", about {_clock((time.monotonic() - began) * (total - self.done) / (self.done - first))} left"


@contextmanager
def bar(text: str, total: int | None = None, *, silent: bool = False) -> Iterator[Bar]:
    """Show how much of a piece of work is done, how long it took and how long it may take; gives its `Bar`."""
    if silent or importlib.util.find_spec("rich") is None:
        yield Bar(text, total, None, silent=silent)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(text, total, None, silent=False)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as shown:
        yield Bar(text, total, shown, silent=silent)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
