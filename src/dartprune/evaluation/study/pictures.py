"""Pictures of a study. Arms differ in colour and in dashes, so that they can be told apart in print and by everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dartprune.evaluation.stats import Interval, band
from dartprune.evaluation.study.analysis import Recovery
from dartprune.evaluation.study.detector import CurvePoint, frontier
from dartprune.evaluation.study.results import Record, Results
from dartprune.report import Event, SequenceReport
from dartprune.reporting.plot import BLUE, GREEN, GREY, ORANGE, draw_similarity

Array = NDArray[Any]
PURPLE = "#AA4499"
_KNOWN: dict[str, tuple[str, Any]] = {
    "dense": ("black", "-"),
    "dart-frozen": (ORANGE, "--"),
    "dart": (BLUE, "-"),
    "dart-relearn": (GREEN, "-."),
    "griffin": (GREY, ":"),
}
_OTHERS: list[tuple[str, Any]] = [(PURPLE, (0, (5, 1))), ("#44AA99", (0, (1, 1))), ("#882255", (0, (3, 1, 1, 1)))]
_DASHES: list[Any] = ["-", (0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)), (0, (2, 2))]
_LABELS = {"attention": "attention output", "residual": "residual before the FFN"}


def _styles(results: Results) -> dict[str, tuple[Any, Any]]:
    releases = [arm.name for arm in results.arms if arm.release is not None]
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(1, len(releases))))
    styles: dict[str, tuple[Any, Any]] = {
        name: (tuple(shade), _DASHES[i % len(_DASHES)])
        for i, (name, shade) in enumerate(zip(releases, shades, strict=False))
    }
    others = iter(_OTHERS * len(results.arms))
    for arm in results.arms:
        if arm.name not in styles:
            styles[arm.name] = _KNOWN.get(arm.name) or next(others)
    return styles


def _shown(results: Results) -> list[Record]:
    """Dense, frozen, one release in the middle and the arm that detects: what a picture can hold."""
    releases = [arm.name for arm in results.arms if arm.release is not None]
    names = ["dense", results.frozen.arm.name if results.frozen else "", *releases[len(releases) // 2 :][:1]]
    names.append(results.detecting.arm.name if results.detecting else "")
    return [record for name in dict.fromkeys(names) if (record := results.get(name)) is not None]


def _line(axes: Axes, x: Array, values: Array, style: tuple[Any, Any], label: str | None, shade: bool = True) -> None:
    mean, low, high = band(values)
    axes.plot(x, mean, color=style[0], linestyle=style[1], linewidth=1.6, label=label)
    if shade:
        axes.fill_between(x, low, high, color=style[0], alpha=0.15, linewidth=0)


def _windows(results: Results) -> Array:
    """The middle of each window."""
    return np.asarray(results.settings.window * (np.arange(results.settings.windows) + 0.5))


def _mark_change(axes: Axes, results: Results, label: str | None = "the topic changes") -> None:
    axes.axvline(results.settings.before, color="black", linestyle=":", linewidth=1.2, label=label)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)


def _grid(results: Results) -> tuple[Figure, dict[tuple[int, str], Axes]]:
    """One row of axes for each layer, one column for each space."""
    layers = sorted({point.layer for point in results.points})
    spaces = list(dict.fromkeys(point.space for point in results.points))
    figure = Figure(figsize=(1.2 + 4.8 * len(spaces), 0.9 + 2.2 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(spaces), sharex=True, squeeze=False)
    axes = {(layer, space): grid[i, j] for i, layer in enumerate(layers) for j, space in enumerate(spaces)}
    for (layer, space), ax in axes.items():
        ax.set_title(f"layer {layer}, {_LABELS[space]}", loc="left", fontsize=10)
        if layer == layers[-1]:
            ax.set_xlabel("decoded token")
    return figure, axes


def trajectories(results: Results) -> Figure:
    """Cosine of each window's mean with the first topic's centroid, at every point that was looked at."""
    figure, grid = _grid(results)
    styles = _styles(results)
    for place, point in enumerate(results.points):
        ax = grid[point.layer, point.space]
        for record in _shown(results):
            _line(
                ax,
                _windows(results),
                record.measure("cosine_to_first_topic", place),
                styles[record.arm.name],
                record.arm.name,
            )
            if record.arm.release is not None:
                ax.axvline(record.arm.release, color=styles[record.arm.name][0], linewidth=1.0, alpha=0.7)
        steady = results.get("dense", "control")
        if steady is not None:
            mean = band(steady.measure("cosine_to_first_topic", place))[0]
            ax.plot(_windows(results), mean, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), label="dense, one topic")
        _mark_change(ax, results)
        if point.space == results.points[0].space:
            ax.set_ylabel("cosine with the\nfirst topic")
    _legend(figure, next(iter(grid.values())))
    return figure


def divergence(results: Results) -> Figure:
    """Cosine of each window's mean with the dense model's at the same tokens: at every point, every arm."""
    figure, grid = _grid(results)
    styles = _styles(results)
    for place, point in enumerate(results.points):
        ax = grid[point.layer, point.space]
        for arm in results.arms:
            record = results.get(arm.name)
            if record is not None and arm.pruner.prunes:
                values = record.measure("cosine_to_dense", place)
                _line(ax, _windows(results), values, styles[arm.name], arm.name, shade=arm.release is None)
        _mark_change(ax, results)
        # where no pruned FFN lies below, the difference is rounding
        ax.set_ylim(bottom=min(0.9, ax.get_ylim()[0]), top=1.01)
        if point.space == results.points[0].space:
            ax.set_ylabel("cosine with the\ndense model")
    _legend(figure, next(iter(grid.values())))
    return figure


def _per_window(results: Results, per_token: Array) -> Array:
    return np.asarray(per_token.reshape(results.settings.windows, results.settings.window, -1).mean(1))


def losses(results: Results) -> Figure:
    """Loss over dense, window by window: texts that change their topic, and texts that keep it."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    kinds = [kind for kind in ("change", "control") if results.get("dense", kind) is not None]
    grid = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    styles = _styles(results)
    for ax, kind in zip(grid, kinds, strict=True):
        for arm in results.arms:
            record = results.get(arm.name, kind)
            if record is not None and arm.pruner.prunes and arm.release is None:
                _line(ax, _windows(results), _per_window(results, results.excess(record)), styles[arm.name], arm.name)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xlabel("decoded token")
        ax.set_title("the topic changes" if kind == "change" else "one topic", loc="left")
        _mark_change(ax, results, "the topic changes" if kind == "change" else None)
    grid[0].set_ylabel("loss over dense in nats")
    _legend(figure, grid[0])
    return figure


def recovery(results: Results, rows: Sequence[Recovery]) -> Figure:
    """Loss over dense around each release, and the share of the loss and of the similarity that it gave back."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    styles = _styles(results)
    frozen = results.frozen
    assert frozen is not None
    x = _windows(results)
    _line(upper, x, _per_window(results, results.excess(frozen)), styles[frozen.arm.name], frozen.arm.name)
    for row in rows:
        record = results.records[f"dart-release@{row.release}", "change"]
        style = styles[record.arm.name]
        _line(upper, x, _per_window(results, results.excess(record)), style, record.arm.name, shade=False)
        upper.plot([row.release], [0], marker="^", color=style[0], markersize=8, clip_on=False, zorder=5)
    _mark_change(upper, results)
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_xlabel("decoded token (triangles: releases)")
    upper.set_ylabel("loss over dense in nats")
    upper.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    times = [row.release for row in rows]
    width = (max(times) - min(times) or max(times)) * 0.012
    _bars(lower, [t - width for t in times], [row.regained for row in rows], "o", BLUE, "loss")
    _bars(
        lower, [t + width for t in times], [row.similarity_regained for row in rows], "s", ORANGE, "cosine with dense"
    )
    lower.axhline(results.settings.recovered, color=GREY, linestyle="--", label="wanted")
    lower.axhline(1, color="black", linewidth=0.8)
    lower.set_xticks(times)
    low = min([row.regained.low for row in rows] + [row.similarity_regained.low for row in rows])
    lower.set_ylim(max(-0.5, min(0.0, low)), 1.1)
    lower.set_xlabel("released at decoded token")
    lower.set_ylabel(f"share regained within\n{rows[0].tokens} tokens")
    lower.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _bars(axes: Axes, x: Sequence[float], values: Sequence[Interval], mark: str, colour: str, label: str) -> None:
    middle = np.array([v.value for v in values])
    ends = np.clip([[v.value - v.low for v in values], [v.high - v.value for v in values]], 0, None)
    axes.errorbar(x, middle, yerr=ends, fmt=mark, color=colour, capsize=3, label=label)


def detector(results: Results, points: Sequence[CurvePoint]) -> Figure:
    """Delay against false alarms over thresholds, and the share of changes that is noticed early."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = frontier(points)
    marks = {1: ("o", ORANGE), 2: ("s", BLUE), 3: ("^", GREEN)}
    for patience, (mark, colour) in marks.items():
        group = [p for p in points if p.patience == patience]
        timely = [p for p in group if p.delay is not None]
        drawn: dict[str, Any] = {"color": colour, "markersize": 5, "markerfacecolor": "none", "linestyle": "none"}
        left.plot(
            [p.false_alarms for p in timely],
            [p.delay or 0 for p in timely],
            marker=mark,
            label=f"patience {patience}",
            **drawn,
        )
        right.plot([p.false_alarms for p in group], [_timely(p) for p in group], marker=mark, **drawn)
    left.plot([p.false_alarms for p in best], [p.delay or 0 for p in best], color=GREY, linewidth=1.2, label="the best")
    shown = results.detecting
    if shown is not None:
        d = shown.arm.pruner.detector
        same = [p for p in points if (p.delta, p.min_drop, p.patience) == (d.delta, d.min_drop, d.patience)]
        for point in same:
            left.plot(
                [point.false_alarms], [point.delay or 0], "*", color="black", ms=13, label=f"as {shown.arm.name} has it"
            )
            right.plot([point.false_alarms], [_timely(point)], "*", color="black", ms=13)
    left.set_ylabel("median delay in tokens")
    right.set_ylabel(f"share of texts that fired within\n{results.settings.early} tokens after the change, not before")
    right.set_ylim(-0.03, 1.03)
    for ax in (left, right):
        ax.set_xlabel("first false alarms for 1,000 tokens")
    _legend(figure, left)
    return figure


def _timely(point: CurvePoint) -> float:
    """Share of all texts in which the detector fired soon after the change and not before it."""
    return point.early * (1 - point.fired_before)


def single_texts(results: Results, record: Record, count: int = 3) -> Figure:
    """What the detector saw in the first texts of the arm that detects: windows, thresholds, events, change."""
    count = min(count, record.texts)
    figure = Figure(figsize=(9, 2.7 * count), layout="constrained")
    for number, ax in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
        sequence = SequenceReport(
            number, 0, 0, 0, results.settings.steps, 0.0,
            [Event(**event) for event in record.events[number]], None,
            [(at, cosine, threshold) for at, cosine, threshold in record.similarities[number]],
        )  # fmt: skip
        draw_similarity(ax, sequence, change=results.settings.before)
        ax.set_title(results.names[record.kind][number], loc="left", fontsize=10)
        if number < count - 1:
            ax.set_xlabel("")
    return figure


def turnover(results: Results, record: Record) -> Figure:
    """Layer by layer: neurons that events exchanged, and the share of each topic's own best neurons that is kept."""
    s = results.settings
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    moved = np.zeros((len(results.neurons), s.windows))
    for row in record.neurons:
        column = min((row["decoded"] - 1) // s.window, s.windows - 1)
        moved[:, column] += (np.array(row["added"]) + np.array(row["dropped"])) / np.array(results.neurons)
    edges = s.window * np.arange(s.windows + 1)
    image = upper.pcolormesh(
        edges, np.arange(len(results.neurons) + 1) - 0.5, 100 * moved / record.texts, cmap="cividis", vmin=0
    )  # fmt: skip
    figure.colorbar(image, ax=upper, label="% of neurons exchanged\nfor a text and window")
    upper.axvline(s.before, color="white", linestyle=":", linewidth=1.5)
    upper.set_ylabel("layer")
    upper.set_yticks(range(0, len(results.neurons), max(1, len(results.neurons) // 8)))
    styles = _styles(results)
    frozen = results.frozen
    for ax, topic, said in ((middle, 0, "first"), (lower, 1, "second")):
        for shown in [r for r in (record, frozen) if r is not None]:
            values = shown.overlap[:, topic].mean(1)
            _line(ax, _windows(results), values, styles[shown.arm.name], shown.arm.name)
        _mark_change(ax, results)
        ax.set_ylabel(f"share of the {said}\ntopic's own kept")
        ax.set_ylim(0, 1.02)
    lower.set_xlabel("decoded token")
    upper.set_title(
        f"{record.arm.name}: exchange of neurons by layer (dotted: the topic changes)", loc="left", fontsize=10
    )
    lower.legend(loc="lower right", ncols=3, frameon=False, fontsize=9)
    return figure
