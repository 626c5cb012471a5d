"""Pictures of results, told apart by the colour-blind and in print."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartprune.bench.result import MemoryRow, Result, Row
from dartprune.reporting.plot import AMBER, BLUE, GREEN, GREY, ORANGE, SKY, save

LOOKS = ((GREY, ""), (ORANGE, "//"), (GREEN, ".."), (BLUE, ""), (AMBER, "xx"), (SKY, "\\\\"))
CLAIM = 10e6  # bytes a sequence, DART section 4.4


def save_result(result: Result, path: Path) -> None:
    """Bars of every row; the ending of the path decides the format."""
    cases = len({row.case for row in result.rows})
    figure = Figure(figsize=(8, 1.2 + 0.26 * (len(result.rows) + cases)), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result.rows if isinstance(row, Row)]
    if rows:
        draw_rows(axes, rows)
    else:
        draw_memory(axes, [row for row in result.rows if isinstance(row, MemoryRow)])
    axes.set_title(f"dartprune bench {result.what}, {result.device}", loc="left")
    save(figure, path)


def draw_rows(axes: Axes, rows: list[Row]) -> None:
    """Times as fast as the first arm, with quartiles; the limit of each row as a mark; a heading for each case."""
    places, place = [], 0
    for number, row in enumerate(rows):
        if number == 0 or row.case != rows[number - 1].case:
            axes.text(0.01, place, row.case, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            place += 1
        places.append(place)
        place += 1
    for number, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
        colour, hatch = LOOKS[number % len(LOOKS)]
        mine = [(at, row.times_as_fast) for at, row in zip(places, rows, strict=True) if row.arm == arm]
        low, high = [r.median - r.lower for _, r in mine], [r.upper - r.median for _, r in mine]
        axes.barh(
            [at for at, _ in mine],
            [ratio.median for _, ratio in mine],
            xerr=[low, high],
            color=colour,
            hatch=hatch,
            edgecolor="white",
            ecolor="black",
        )
    limits = [(at, row.limit) for at, row in zip(places, rows, strict=True) if row.limit is not None]
    if limits:
        at, values = zip(*limits, strict=True)
        axes.plot(values, at, "|", color="black", markersize=11, markeredgewidth=2, label="limit", linestyle="none")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks(places, [row.arm for row in rows], fontsize=8)
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlabel(f"times as fast as {rows[0].arm}")


def draw_memory(axes: Axes, rows: list[MemoryRow]) -> None:
    """Megabytes a sequence for all layers: by measurement, by the report, and what the paper claims."""
    for place, row in enumerate(rows):
        labels = ("measured", "reported") if place == 0 else (None, None)
        axes.barh(place - 0.2, row.all_layers_measured / 1e6, 0.36, color=BLUE, label=labels[0])
        axes.barh(place + 0.2, row.all_layers_reported / 1e6, 0.36, color=ORANGE, hatch="//", edgecolor="white",
                  label=labels[1])  # fmt: skip
    axes.axvline(CLAIM / 1e6, color="black", linewidth=2, label="claimed at most")
    axes.set_yticks(range(len(rows)), [f"{row.case}\n{row.arm}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("MB a sequence, all layers")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
