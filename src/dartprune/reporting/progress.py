"""A progress bar on standard error that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def bar(text: str, total: int, *, silent: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how much of a piece of work is done; gives a function that is told of each further part."""
    console = Console(stderr=True)
    # elsewhere than on a terminal it would leave empty lines
    with Progress(console=console, transient=True, disable=silent or not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)
