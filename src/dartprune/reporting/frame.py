"""A folder of results: data as JSON and CSV, pictures as PNG and SVG, and one page that shows them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dartprune.reporting.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Frame:
    """Writes the files of one report; text and tables go to its `page`, whose parts keep the order of the calls."""

    def __init__(self, folder: Path, title: str) -> None:
        """Make the folder, if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.page = Page(title)
        self._paths: list[Path] = []

    def json(self, name: str, data: Any, *, indent: int | None = 1) -> None:
        """Write plain data to NAME.json."""
        self._new(f"{name}.json").write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")

    def csv(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows of the same keys to NAME.csv; no file for no rows."""
        iterator = iter(rows)
        first = next(iterator, None)
        if first is None:
            return
        with self._new(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(first))
            writer.writeheader()
            writer.writerow(first)
            writer.writerows(iterator)

    def picture(self, name: str, figure: Figure, caption: str) -> None:
        """Write a figure to NAME.png and NAME.svg, and show it on the page."""
        from dartprune.reporting.plot import save

        save(figure, self._new(f"{name}.png"))
        self._new(f"{name}.svg").write_bytes(self.page.picture(figure, caption))

    def close(self, settings: Mapping[str, Any]) -> list[Path]:
        """Write report.html, the settings folded away at its end; all files, the page first."""
        self.page.settings(settings)
        page = self.folder / "report.html"
        self.page.write(page)
        return [page, *self._paths]

    def _new(self, name: str) -> Path:
        self._paths.append(self.folder / name)
        return self._paths[-1]
