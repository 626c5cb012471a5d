"""The palette of every picture, and pictures of what a run did.

Okabe and Ito's colours without the yellow, which vanishes on white; dashes and marks differ too, for print.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartprune.report import Report, SequenceReport

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY = COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666",
)  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
MARKS = "osD^vPX<>*"
EVENTS = {"replay": ("v", ORANGE), "settle": ("o", GREEN), "relearn": ("s", ORANGE), "release": ("X", ORANGE)}


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and mark of a line; 28 lines before a pair of colour and dashes comes again."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
    }


def shades(count: int) -> list[Any]:
    """Colours of things that have an order, from dark to light."""
    return [colormaps["viridis"](0.85 * i / max(1, count - 1)) for i in range(count)]


def legend_beside(axes: Axes, ends: Mapping[str, float] | None = None) -> None:
    """A legend on the right of the axes; with `ends` in the order in which the lines end, the highest first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -ends[labels[i]] if ends else i)
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        handlelength=3.0,
    )


def loss_axis(axes: Axes, name: str, low: float, high: float) -> None:
    """Losses up the axes: arms differ by a factor of a hundred, so logarithmic, but even around 0, which noise crosses.

    Args:
        axes: where.
        name: of the figure.
        low: the smallest value that is shown.
        high: the largest.
    """
    axes.axhline(0, color=GREY, linewidth=0.8)
    even = max(0.02, high / 100)
    axes.set_yscale("symlog", linthresh=even, linscale=0.4)
    axes.set_ylim(min(-0.3 * even, 1.2 * low), max(1.2 * high, 2 * even))
    steps = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if t >= even]
    ticks = [*(-t for t in reversed(steps) if -t >= 1.2 * low), 0.0, *(t for t in steps if t <= 1.2 * high)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylabel(name)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the ending of the path decides the format."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def save_run(report: Report, path: Path) -> None:
    """Similarity over the decoded tokens, events, and the neurons each layer keeps, of the first sequence."""
    sequence = report.sequences[0]
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    draw_similarity(upper, sequence)
    draw_budget(lower, [layer.index for layer in report.layers], _shares(report, sequence))
    upper.set_title(
        f"{report.method}, sparsity {report.target_sparsity:g} (realised {report.realised_sparsity:.3f}), "
        f"{report.backend} backend",
        loc="left",
    )
    save(figure, path)


def save_budget(layers: Sequence[dict[str, Any]], path: Path) -> None:
    """Sensitivity of each layer beside the share of its neurons that it keeps."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    places = [layer["layer"] for layer in layers]
    upper.bar(places, [layer["sensitivity"] for layer in layers], color=BLUE)
    upper.set_ylabel("sensitivity")
    draw_budget(lower, places, [layer["keep"] / layer["neurons"] for layer in layers])
    save(figure, path)


def draw_similarity(axes: Axes, sequence: SequenceReport, change: int | None = None) -> None:
    """One sequence's windows: cosine with the reference, the threshold it must not fall under, and the events.

    Args:
        axes: where to draw.
        sequence: what happened.
        change: decoded token at which the topic changes, if it is known.
    """
    axes.set_xlabel("decoded token")
    axes.set_ylabel("cosine with the reference")
    if not sequence.similarities:
        axes.text(0.5, 0.5, "the detector judged no window", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    tokens, cosines, thresholds = zip(*sequence.similarities, strict=True)
    for number, (first, last) in enumerate(_stretches(tokens)):
        span = slice(first, last)
        label = ("similarity of a window", "threshold") if number == 0 else (None, None)
        axes.plot(tokens[span], cosines[span], color=BLUE, marker=".", label=label[0])
        axes.plot(tokens[span], thresholds[span], color=GREY, linestyle="--", label=label[1])
    low = min((*cosines, *thresholds))
    for kind, (mark, colour) in EVENTS.items():
        at = [event.decoded for event in sequence.events if event.kind == kind]
        if at:
            for token in at:
                axes.axvline(token, color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(at, [low - 0.03] * len(at), mark, color=colour, label=kind, linestyle="none")
    if change is not None:
        axes.axvline(change, color="black", linestyle=":", linewidth=1.5, label="the topic changes")
    axes.margins(x=0.02)
    legend_beside(axes)


def _stretches(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of windows that follow each other; the detector rests in between."""
    window = min((b - a for a, b in itertools.pairwise(tokens)), default=1)
    cuts = [i for i in range(1, len(tokens)) if tokens[i] - tokens[i - 1] > window]
    return list(zip([0, *cuts], [*cuts, len(tokens)], strict=True))


def draw_budget(axes: Axes, layers: Sequence[int], kept: Sequence[float]) -> None:
    """Share of its neurons that each layer keeps."""
    axes.bar(layers, kept, color=BLUE)
    axes.set_ylim(0, 1)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of neurons kept")
    axes.set_xticks(list(layers)[:: 1 + len(layers) // 20])


def _shares(report: Report, sequence: SequenceReport) -> list[float]:
    if sequence.keep is None:
        return [1.0] * len(report.layers)
    return [k / layer.neurons for k, layer in zip(sequence.keep, report.layers, strict=True)]
