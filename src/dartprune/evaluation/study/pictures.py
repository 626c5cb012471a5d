"""Pictures of a study. Arms differ in colour and in dashes, so that they can be told apart in print and by everyone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartprune.evaluation.stats import Array, Interval, band
from dartprune.evaluation.study.detector import CurvePoint, frontier
from dartprune.evaluation.study.observe import Point
from dartprune.evaluation.study.recovery import Recovery
from dartprune.evaluation.study.results import Record, Results
from dartprune.report import Event, SequenceReport
from dartprune.reporting.plot import BLUE, DASHES, GREEN, GREY, ORANGE, draw_similarity, legend_beside, look, shades

_KNOWN: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "linestyle": "-"},
    "dart-frozen": {"color": ORANGE, "linestyle": "--"},
    "dart": {"color": BLUE, "linestyle": "-"},
    "dart-relearn": {"color": GREEN, "linestyle": "-."},
    "griffin": {"color": GREY, "linestyle": ":"},
}
_LABELS = {"attention": "attention output", "residual": "residual before the FFN"}


class _Pen:
    """Draws arms of a study, each in its own colour and dashes."""

    def __init__(self, results: Results) -> None:
        self.results = results
        s = results.settings
        self.x: Array = s.window * (np.arange(s.windows) + 0.5)  # the middle of each window
        others = [arm.name for arm in results.arms if arm.name not in _KNOWN and arm.release is None]
        # the first colours are those of the known arms
        self.styles = {name: look(3 + i) | {"marker": None} for i, name in enumerate(others)} | _KNOWN
        for i, (arm, shade) in enumerate(zip(results.releases, shades(len(results.releases)), strict=True)):
            self.styles[arm.name] = {"color": shade, "linestyle": DASHES[i % len(DASHES)]}

    def line(self, axes: Axes, record: Record, values: Array, shade: bool = True) -> None:
        """A band over texts: values [windows, texts]."""
        mean, low, high = band(values)
        style = self.styles[record.arm.name]
        axes.plot(self.x, mean, linewidth=1.6, label=record.arm.name, **style)
        if shade:
            axes.fill_between(self.x, low, high, color=style["color"], alpha=0.15, linewidth=0)

    def loss(self, axes: Axes, record: Record, shade: bool = True) -> None:
        """Loss over dense, window by window."""
        self.line(axes, record, self.results.windowed_excess(record), shade)

    def change(self, axes: Axes, label: str | None = "the topic changes") -> None:
        """The change of topic."""
        axes.axvline(self.results.settings.before, color="black", linestyle=":", linewidth=1.2, label=label)


def _shown(results: Results) -> list[Record]:
    """Dense, frozen, one release in the middle and the arm that detects: what a picture can hold."""
    releases = results.releases
    middle = [results.get(arm.name) for arm in releases[len(releases) // 2 :][:1]]
    records = [results.get("dense"), results.frozen, *middle, results.detecting]
    return list({record.arm.name: record for record in records if record is not None}.values())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)


def _each_point(results: Results, label: str, draw: Callable[[Axes, _Pen, int], None]) -> Figure:
    """One row of axes for each layer, one column for each space."""
    layers = sorted({point.layer for point in results.points})
    spaces = list(dict.fromkeys(point.space for point in results.points))
    figure = Figure(figsize=(1.2 + 4.8 * len(spaces), 0.9 + 2.2 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(spaces), sharex=True, squeeze=False)
    pen = _Pen(results)
    for (i, j), axes in np.ndenumerate(grid):
        axes.set_title(f"layer {layers[i]}, {_LABELS[spaces[j]]}", loc="left", fontsize=10)
        draw(axes, pen, results.points.index(Point(layers[i], spaces[j])))
        if j == 0:
            axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("decoded token")
    _legend(figure, grid[0, 0])
    return figure


def trajectories(results: Results) -> Figure:
    """Cosine of each window's mean with the first topic's centroid, at every point that was looked at."""
    steady = results.get("dense", "control")

    def draw(axes: Axes, pen: _Pen, place: int) -> None:
        for record in _shown(results):
            pen.line(axes, record, record.measure("cosine_to_first_topic", place))
            if record.arm.release is not None:
                colour = pen.styles[record.arm.name]["color"]
                axes.axvline(record.arm.release, color=colour, linewidth=1.0, alpha=0.7)
        if steady is not None:
            mean = band(steady.measure("cosine_to_first_topic", place))[0]
            axes.plot(pen.x, mean, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), label="dense, one topic")
        pen.change(axes)

    return _each_point(results, "cosine with the\nfirst topic", draw)


def divergence(results: Results) -> Figure:
    """Cosine of each window's mean with the dense model's at the same tokens: at every point, every arm."""

    def draw(axes: Axes, pen: _Pen, place: int) -> None:
        for record in results.pruning():
            pen.line(axes, record, record.measure("cosine_to_dense", place), shade=record.arm.release is None)
        pen.change(axes)
        # where no pruned FFN lies below, the difference is rounding
        axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]), top=1.01)

    return _each_point(results, "cosine with the\ndense model", draw)


def losses(results: Results) -> Figure:
    """Loss over dense, window by window: texts that change their topic, and texts that keep it."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    kinds = [kind for kind in ("change", "control") if results.get("dense", kind) is not None]
    grid = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    pen = _Pen(results)
    for axes, kind in zip(grid, kinds, strict=True):
        for record in results.pruning(kind):
            if record.arm.release is None:
                pen.loss(axes, record)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("decoded token")
        axes.set_title("the topic changes" if kind == "change" else "one topic", loc="left")
        pen.change(axes, "the topic changes" if kind == "change" else None)
    grid[0].set_ylabel("loss over dense in nats")
    _legend(figure, grid[0])
    return figure


def recovery(results: Results, rows: Sequence[Recovery]) -> Figure:
    """Loss over dense around each release, and the share of the loss and of the similarity that it gave back."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    pen = _Pen(results)
    frozen = results.frozen
    assert frozen is not None
    pen.loss(upper, frozen)
    for arm in results.releases:
        pen.loss(upper, results.records[arm.name, "change"], shade=False)
        colour = pen.styles[arm.name]["color"]
        upper.plot([arm.release], [0], marker="^", color=colour, markersize=8, clip_on=False, zorder=5)
    pen.change(upper)
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_xlabel("decoded token (triangles: releases)")
    upper.set_ylabel("loss over dense in nats")
    legend_beside(upper)
    times = [row.release for row in rows]
    width = (max(times) - min(times) or max(times)) * 0.012
    both = [row.similarity_regained for row in rows]
    _bars(lower, [t - width for t in times], [row.regained for row in rows], "o", BLUE, "loss")
    _bars(lower, [t + width for t in times], both, "s", ORANGE, "cosine with dense")
    lower.axhline(results.settings.recovered, color=GREY, linestyle="--", label="wanted")
    lower.axhline(1, color="black", linewidth=0.8)
    lower.set_xticks(times)
    low = min(min(row.regained.low, row.similarity_regained.low) for row in rows)
    lower.set_ylim(max(-0.5, min(0.0, low)), 1.1)
    lower.set_xlabel("released at decoded token")
    lower.set_ylabel(f"share regained within\n{rows[0].tokens} tokens")
    legend_beside(lower)
    return figure


def _bars(axes: Axes, x: Sequence[float], values: Sequence[Interval], mark: str, colour: str, label: str) -> None:
    ends = np.clip([[v.value - v.low for v in values], [v.high - v.value for v in values]], 0, None)
    axes.errorbar(x, [v.value for v in values], yerr=ends, fmt=mark, color=colour, capsize=3, label=label)


def detector(results: Results, points: Sequence[CurvePoint]) -> Figure:
    """Delay against false alarms over thresholds, and the share of changes that is noticed early."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    def draw(group: Sequence[CurvePoint], mark: str, label: str, **style: Any) -> None:
        timely = [p for p in group if p.delay is not None]
        style = {"marker": mark, "linestyle": "none", "markersize": 5} | style
        left.plot([p.false_alarms for p in timely], [p.delay or 0 for p in timely], label=label, **style)
        # share of all texts in which the detector fired soon after the change and not before it
        right.plot([p.false_alarms for p in group], [p.early * (1 - p.fired_before) for p in group], **style)

    for patience, (mark, colour) in {1: ("o", ORANGE), 2: ("s", BLUE), 3: ("^", GREEN)}.items():
        group = [p for p in points if p.patience == patience]
        draw(group, mark, f"patience {patience}", color=colour, markerfacecolor="none")
    best = frontier(points)
    left.plot([p.false_alarms for p in best], [p.delay or 0 for p in best], color=GREY, linewidth=1.2, label="the best")
    detecting = results.detecting
    if detecting is not None:
        d = detecting.arm.pruner.detector
        same = [p for p in points if (p.delta, p.min_drop, p.patience) == (d.delta, d.min_drop, d.patience)]
        if same:
            draw(same, "*", f"as {detecting.arm.name} has it", color="black", markersize=13)
    left.set_ylabel("median delay in tokens")
    right.set_ylabel(f"share of texts that fired within\n{results.settings.early} tokens after the change, not before")
    right.set_ylim(-0.03, 1.03)
    for axes in (left, right):
        axes.set_xlabel("first false alarms for 1,000 tokens")
    _legend(figure, left)
    return figure


def single_texts(results: Results, record: Record, count: int = 3) -> Figure:
    """What the detector saw in the first texts of the arm that detects: windows, thresholds, events, change."""
    count = min(count, record.texts)
    figure = Figure(figsize=(9, 2.7 * count), layout="constrained")
    for number, axes in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
        sequence = SequenceReport(
            number, 0, 0, 0, results.settings.steps, 0.0,
            [Event(**event) for event in record.events[number]], None,
            [(at, cosine, threshold) for at, cosine, threshold in record.similarities[number]],
        )  # fmt: skip
        draw_similarity(axes, sequence, change=results.settings.before)
        axes.set_title(results.names[record.kind][number], loc="left", fontsize=10)
        if number < count - 1:
            axes.set_xlabel("")
    return figure


def turnover(results: Results, record: Record) -> Figure:
    """Layer by layer: neurons that events exchanged, and the share of each topic's own best neurons that is kept."""
    s, layers = results.settings, len(results.neurons)
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    moved = np.zeros((layers, s.windows))
    for row in record.neurons:
        column = min((row["decoded"] - 1) // s.window, s.windows - 1)
        moved[:, column] += (np.array(row["added"]) + np.array(row["dropped"])) / np.array(results.neurons)
    edges = s.window * np.arange(s.windows + 1), np.arange(layers + 1) - 0.5
    image = upper.pcolormesh(*edges, 100 * moved / record.texts, cmap="cividis", vmin=0)
    figure.colorbar(image, ax=upper, label="% of neurons exchanged\nfor a text and window")
    upper.axvline(s.before, color="white", linestyle=":", linewidth=1.5)
    upper.set_ylabel("layer")
    upper.set_yticks(range(0, layers, max(1, layers // 8)))
    title = f"{record.arm.name}: exchange of neurons by layer (dotted: the topic changes)"
    upper.set_title(title, loc="left", fontsize=10)
    pen = _Pen(results)
    for axes, topic, said in ((middle, 0, "first"), (lower, 1, "second")):
        for shown in [r for r in (record, results.frozen) if r is not None]:
            pen.line(axes, shown, shown.overlap[:, topic].mean(1))
        pen.change(axes)
        axes.set_ylabel(f"share of the {said}\ntopic's own kept")
        axes.set_ylim(0, 1.02)
    lower.set_xlabel("decoded token")
    lower.legend(loc="lower right", ncols=3, frameon=False, fontsize=9)
    return figure
