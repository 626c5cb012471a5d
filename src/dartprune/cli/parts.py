"""What the commands of evaluation share: lists on the command line, tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dartprune.reporting.page import Sheet


def words(text: str | None) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas; ValueError naming the option."""
    try:
        return tuple(float(part) for part in words(text))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from None


def show(tables: Sequence[Sheet], *, before: str = "", after: Sequence[str] = ()) -> None:
    """Print tables with lines before and after them."""
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console()
    if before:
        console.print(before, markup=False, highlight=False)
    for table in tables:
        shown = Shown(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in after:
        console.print(line, markup=False, highlight=False)
