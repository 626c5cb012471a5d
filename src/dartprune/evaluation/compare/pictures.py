"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from dartprune.evaluation.compare.outcomes import Comparison, Outcome
from dartprune.evaluation.compare.plan import CHANGING
from dartprune.reporting.plot import GREY, legend_beside, look, loss_axis

SMOOTH = 15  # tokens of the moving mean
MARKED = 24  # tokens from one mark on a curve to the next


def styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Colour, dashes and mark of each arm that prunes; the arm that others are paired with is black and thick."""
    versus = comparison.settings["versus"]
    others = [name for name in dict.fromkeys(o.arm for o in comparison.outcomes) if name not in ("dense", versus)]
    out = {name: look(i) | {"linewidth": 1.4, "markersize": 5} for i, name in enumerate(others)}
    return out | {versus: {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.4, "markersize": 5}}


def smoothed(values: Sequence[float | None], window: int = SMOOTH) -> np.ndarray:
    """Centred moving mean; at the ends over what is there."""
    array = np.asarray(values, dtype=float)
    kernel = np.ones(min(window, len(array)))
    return np.convolve(array, kernel, mode="same") / np.convolve(np.ones_like(array), kernel, mode="same")


def curves(comparison: Comparison) -> Figure:
    """Loss over dense against the distance from the topic change, a panel for each sparsity."""
    targets = comparison.settings["sparsities"]
    style = styles(comparison)
    figure, panels = _stack(len(targets), 3.4)
    change = comparison.settings["lengths"][0] - comparison.settings["prompt"]
    after = change + comparison.settings["left_out_after_change"]
    for axes, target in zip(panels, targets, strict=True):
        ends: dict[str, float] = {}
        low, high = 0.0, 0.0
        for number, outcome in enumerate(comparison.of(CHANGING, target)):
            label = _label(outcome)
            # the sides are smoothed apart, so that nothing leaks over the change
            for first, last in ((0, change), (after, len(outcome.curve))):
                line = smoothed(outcome.curve[first:last])
                every = (3 * number % MARKED, MARKED)
                said = label if first else None
                axes.plot(np.arange(first, last) - change, line, label=said, markevery=every, **style[outcome.arm])
                ends[label] = float(line[len(line) // 2 :].mean())
                low, high = min(low, line.min()), max(high, line.max())
        axes.axvline(0, color=GREY, linewidth=1)
        _finish(axes, f"{target:.0%} realised sparsity", low, high, ends)
        axes.margins(x=0.01)
    panels[-1].set_xlabel(f"tokens from the change of topic (mean over streams, moving mean of {SMOOTH} tokens)")
    return figure


def against_sparsity(comparison: Comparison) -> Figure:
    """Loss over dense against realised sparsity, with intervals, a panel for each part of the streams."""
    style = styles(comparison)
    parts = list(dict.fromkeys((o.kind, part) for o in comparison.outcomes for part in o.parts))
    figure, panels = _stack(len(parts), 3.8)
    for axes, (kind, part) in zip(panels, parts, strict=True):
        outcomes = [o for o in comparison.of(kind) if o.arm != "dense"]
        names = list(dict.fromkeys(o.arm for o in outcomes))
        ends: dict[str, float] = {}
        for number, name in enumerate(names):
            mine = sorted((o for o in outcomes if o.arm == name), key=lambda o: o.realised_sparsity)
            # arms of one sparsity lie at one place: side by side their intervals can be told apart
            aside = ScaledTranslation(3 * (number - (len(names) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
            label = f"{name} (ceiling)" if mine[0].ceiling else name
            _line(axes, mine, part, label, style[name], axes.transData + aside)
            ends[label] = mine[-1].parts[part].over_dense.value
        bounds = [v for o in outcomes for v in (o.parts[part].over_dense.low, o.parts[part].over_dense.high)]
        title = {"before": "before the change", "after": "after the change"}.get(part, part)
        _finish(axes, title, min(bounds), max(bounds), ends)
    places = [o.realised_sparsity for o in comparison.outcomes if o.arm != "dense"]
    panels[-1].set_xlim(min(places) - 0.05, max(places) + 0.05)  # shared by all panels
    panels[-1].set_xlabel(
        "realised sparsity (side by side: the same one; bars: 95 % over streams; hollow: cannot reach the wanted one)"
    )
    return figure


def _line(axes: Axes, mine: list[Outcome], part: str, label: str, style: dict[str, Any], place: Any) -> None:
    """One arm over its sparsities."""
    x, y = [o.realised_sparsity for o in mine], [o.parts[part].over_dense for o in mine]
    axes.plot(x, [e.value for e in y], **style | {"marker": None, "transform": place})
    axes.vlines(x, [e.low for e in y], [e.high for e in y], color=style["color"], lw=1, transform=place)
    for outcome, at, estimate in zip(mine, x, y, strict=True):
        fill = style["color"] if outcome.reached else "white"
        axes.plot([at], [estimate.value], **style | {"linestyle": "none", "mfc": fill, "transform": place})
    axes.plot([], [], label=label, **style)


def _stack(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, 0.6 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _label(outcome: Outcome) -> str:
    if not outcome.reached:
        return f"{outcome.arm} (realises {outcome.realised_sparsity:.2f})"
    return f"{outcome.arm} (ceiling)" if outcome.ceiling else outcome.arm


def _finish(axes: Axes, title: str, low: float, high: float, ends: dict[str, float]) -> None:
    loss_axis(axes, "loss over dense, nats", low, high)
    axes.set_title(title, loc="left")
    legend_beside(axes, ends)
