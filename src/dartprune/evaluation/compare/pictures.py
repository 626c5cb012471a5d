"""Pictures of a comparison. Colours are told apart by the colour-blind; line and mark differ too, for print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from dartprune.evaluation.compare.outcomes import Comparison, Outcome
from dartprune.evaluation.compare.plan import CHANGING

SMOOTH = 15  # tokens of the moving mean
MARKED = 24  # tokens from one mark on a curve to the next
# Okabe and Ito's colours without the yellow, which vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
MARKS = "osD^vPX<>*"


def styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Colour, dashes and mark of each arm that prunes; the arm that others are paired with is black and thick."""
    versus = comparison.settings["versus"]
    others = [name for name in dict.fromkeys(o.arm for o in comparison.outcomes) if name not in ("dense", versus)]
    out: dict[str, dict[str, Any]] = {
        name: {
            # seven colours and four dashes: 28 arms before a pair comes again
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKS[i % len(MARKS)],
            "linewidth": 1.4,
            "markersize": 5,
        }
        for i, name in enumerate(others)
    }
    out[versus] = {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.4, "markersize": 5}
    return out


def smoothed(values: Sequence[float], window: int = SMOOTH) -> np.ndarray:
    """Centred moving mean; at the ends over what is there."""
    array = np.asarray(values, dtype=float)
    kernel = np.ones(min(window, len(array)))
    return np.convolve(array, kernel, mode="same") / np.convolve(np.ones_like(array), kernel, mode="same")


def curves(comparison: Comparison) -> Figure:
    """Loss over dense against the distance from the topic change, a panel for each sparsity."""
    targets = comparison.settings["sparsities"]
    look = styles(comparison)
    figure = Figure(figsize=(10, 0.6 + 3.4 * len(targets)), layout="constrained")
    change = comparison.settings["lengths"][0] - comparison.settings["prompt"]
    after = change + int(comparison.settings["separator"])
    for axes, target in zip(_stack(figure, len(targets)), targets, strict=True):
        drawn = comparison.of(CHANGING, target)
        ends: dict[str, float] = {}
        low, high = 0.0, 0.0
        for number, outcome in enumerate(drawn):
            # the sides are smoothed apart, so that nothing leaks over the change
            for first, last in ((0, change), (after, len(outcome.curve))):
                line = smoothed(outcome.curve[first:last])
                label = _label(outcome) if first else None
                every = (3 * number % MARKED, MARKED)
                axes.plot(np.arange(first, last) - change, line, label=label, markevery=every, **look[outcome.arm])
                ends[_label(outcome)] = float(line[len(line) // 2 :].mean())
                low, high = min(low, line.min()), max(high, line.max())
        axes.axvline(0, color="#666666", linewidth=1)
        axes.axhline(0, color="#666666", linewidth=0.8)
        _loss_scale(axes, low, high)
        axes.set_title(f"{target:.0%} realised sparsity", loc="left")
        axes.set_ylabel("loss over dense, nats")
        _legend(axes, ends)
        axes.margins(x=0.01)
    axes.set_xlabel(f"tokens from the change of topic (mean over streams, moving mean of {SMOOTH} tokens)")
    return figure


def against_sparsity(comparison: Comparison) -> Figure:
    """Loss over dense against realised sparsity, with intervals, a panel for each part of the streams."""
    look = styles(comparison)
    panels = list(dict.fromkeys((o.kind, part) for o in comparison.outcomes for part in o.parts))
    figure = Figure(figsize=(10, 0.6 + 3.8 * len(panels)), layout="constrained")
    for axes, (kind, part) in zip(_stack(figure, len(panels)), panels, strict=True):
        found = [o for o in comparison.of(kind) if o.arm != "dense"]
        names = list(dict.fromkeys(o.arm for o in found))
        ends: dict[str, float] = {}
        for number, name in enumerate(names):
            mine = sorted((o for o in found if o.arm == name), key=lambda o: o.realised_sparsity)
            y = [o.parts[part].over_dense for o in mine]
            # arms of one sparsity lie at one place: side by side their intervals can be told apart
            aside = ScaledTranslation(3 * (number - (len(names) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
            style = look[name] | {"transform": axes.transData + aside}
            x = [o.realised_sparsity for o in mine]
            axes.plot(x, [e.value for e in y], **style | {"marker": None})
            axes.vlines(
                x, [e.low for e in y], [e.high for e in y], color=style["color"], lw=1, transform=style["transform"]
            )
            for hollow in (False, True):
                chosen = [(o.realised_sparsity, e.value) for o, e in zip(mine, y, strict=True) if o.reached != hollow]
                fill = "white" if hollow else style["color"]
                if chosen:
                    at, height = zip(*chosen, strict=True)
                    axes.plot(at, height, **style | {"linestyle": "none", "mfc": fill})
            label = f"{name} (ceiling)" if mine[0].ceiling else name
            axes.plot([], [], label=label, **look[name])
            ends[label] = y[-1].value
        bounds = [v for o in found for v in (o.parts[part].over_dense.low, o.parts[part].over_dense.high)]
        axes.axhline(0, color="#666666", linewidth=0.8)
        _loss_scale(axes, min(bounds), max(bounds))
        axes.set_title({"before": "before the change", "after": "after the change"}.get(part, part), loc="left")
        axes.set_ylabel("loss over dense, nats")
        _legend(axes, ends)
    places = [o.realised_sparsity for o in comparison.outcomes if o.arm != "dense"]
    axes.set_xlim(min(places) - 0.05, max(places) + 0.05)  # shared by all panels
    axes.set_xlabel(
        "realised sparsity (side by side: the same one; bars: 95 % over streams; hollow: cannot reach the wanted one)"
    )
    return figure


def _stack(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _label(outcome: Outcome) -> str:
    if not outcome.reached:
        return f"{outcome.arm} (realises {outcome.realised_sparsity:.2f})"
    return f"{outcome.arm} (ceiling)" if outcome.ceiling else outcome.arm


def _loss_scale(axes: Axes, low: float, high: float) -> None:
    """Arms differ by a factor of a hundred: logarithmic, but even around 0, which noise may cross."""
    even = max(0.02, high / 100)
    axes.set_yscale("symlog", linthresh=even, linscale=0.4)
    axes.set_ylim(min(-0.3 * even, 1.2 * low), max(1.2 * high, 2 * even))
    ticks = [0.0, *(t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if even <= t <= 1.2 * high)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes: Axes, ends: dict[str, float]) -> None:
    """Beside the panel, in the order in which the lines end."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -ends[labels[i]])
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        handlelength=3.5,
    )
