"""What commands print on the terminal: tables and lines, every character as it is given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Cells(Protocol):
    """A table as data: its title, the names of its columns, and its rows."""

    @property
    def title(self) -> str:
        """Stands above."""

    @property
    def columns(self) -> list[str]:
        """Heads."""

    @property
    def rows(self) -> list[list[str]]:
        """One cell for each column."""


def grid(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    words: Collection[str] = (),
    frame: bool = True,
) -> Table:
    """A table of figures, to the right, under their heads.

    Args:
        columns: heads.
        rows: one cell for each column.
        title: stands above.
        words: heads of columns of words, to the left, beside the first column.
        frame: whether lines are drawn; without them it fits a narrow terminal.
    """
    table = Table(
        title=escape(title) or None,
        title_justify="left",
        box=box.HEAVY_HEAD if frame else None,
        padding=(0, 1) if frame else (0, 1, 0, 0),
        pad_edge=frame,
    )
    for number, column in enumerate(columns):
        left = number == 0 or column in words
        table.add_column(escape(column), justify="left" if left else "right", no_wrap=number == 0 and not frame)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what they are, side by side; notes stand out."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(escape(name), escape(value), style="yellow" if name.startswith("note:") else None)
    return table


def show(*tables: Table) -> None:
    """Print tables."""
    console = Console()
    for table in tables:
        console.print(table)


def show_cells(tables: Iterable[Cells]) -> None:
    """Print tables that are kept as data."""
    show(*(grid(table.columns, table.rows, title=table.title) for table in tables))


def say(*lines: str, style: str | None = None, error: bool = False) -> None:
    """Print lines, broken between words; `error`: on standard error, unbroken."""
    console = Console(stderr=error)
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=error)
