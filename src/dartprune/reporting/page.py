"""One self-contained HTML page from headings, paragraphs, tables and pictures; no script, nothing loaded from afar."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; }
caption { text-align: left; padding-bottom: 0.3rem; opacity: 0.8; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #8884; text-align: right; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.words { white-space: normal; text-align: left; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; background: #fff; }
figure img { width: 100%; height: auto; }
figcaption { background: Canvas; font-size: 0.9rem; opacity: 0.8; }
pre { overflow-x: auto; font-size: 0.85rem; background: #8881; padding: 0.7rem; }
"""


LONGEST_FIGURE = 40  # characters
TextTable = tuple[list[str], list[list[str]]]  # columns and rows


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown: a name in front of each row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def _cell(value: object) -> str:
    """Figures and intervals stay on one line, sentences do not."""
    text = str(value)
    words = ' class="words"' if len(text) > LONGEST_FIGURE else ""
    return f"<td{words}>{escape(text)}</td>"


class Page:
    """Collects the parts of a page in order; `write` makes the file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """A table; every cell as `str` gives it."""
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        said = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def sheet(self, sheet: Sheet) -> None:
        """A table under its title."""
        self.heading(sheet.title)
        self.table(sheet.columns, sheet.rows)

    def picture(self, figure: Figure, caption: str) -> bytes:
        """A matplotlib figure, embedded as the SVG that is returned; the caption describes it to the blind too."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(
            f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
        return buffer.getvalue()

    def settings(self, data: Mapping[str, Any], summary: str = "settings") -> None:
        """Plain data, folded away."""
        text = escape(json.dumps(dict(data), indent=1))
        self._parts.append(f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>")

    def write(self, path: Path) -> None:
        """Write the page to a file."""
        path.write_text(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )
