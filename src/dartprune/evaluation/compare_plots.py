"""Pictures of a comparison. Colours are told apart by the colour-blind; line and mark differ too, for print."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartprune.evaluation.outcomes import Comparison, Outcome
from dartprune.evaluation.plan import CHANGING

SMOOTH = 15  # tokens of the moving mean
# Okabe and Ito's colours without the yellow, which vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))  # type: ignore[assignment]
MARKS = "osD^vPX<>*"


def styles(comparison: Comparison) -> dict[str, dict[str, object]]:
    """Colour, dashes and mark of each arm that prunes; the arm that others are paired with is black and thick."""
    versus = comparison.settings["versus"]
    out: dict[str, dict[str, object]] = {}
    others = [name for name in dict.fromkeys(o.arm for o in comparison.outcomes) if name not in ("dense", versus)]
    for i, name in enumerate(others):
        out[name] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[(i // len(COLOURS) + i) % len(DASHES)],
            "marker": MARKS[i % len(MARKS)],
            "linewidth": 1.4,
        }
    out[versus] = {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.6}
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
    for axes, target in zip(_stack(figure, len(targets)), targets, strict=True):
        drawn = comparison.of(CHANGING, target)
        ends: dict[str, float] = {}
        for outcome in drawn:
            style = {key: value for key, value in look[outcome.arm].items() if key != "marker"}
            after = int(change + comparison.settings["separator"])
            # the sides are smoothed apart, so that nothing leaks over the change
            for first, last in ((0, change), (after, len(outcome.curve))):
                line = smoothed(outcome.curve[first:last])
                label = _label(outcome) if first else None
                axes.plot(np.arange(first, last) - change, line, label=label, **style)  # type: ignore[arg-type]
                ends[_label(outcome)] = float(line[len(line) // 2 :].mean())
        axes.axvline(0, color="#666666", linewidth=1)
        axes.axhline(0, color="#666666", linewidth=0.8)
        _loss_scale(axes, [v for o in drawn for v in smoothed(o.curve)])
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
        ends: dict[str, float] = {}
        for name in dict.fromkeys(o.arm for o in found):
            mine = sorted((o for o in found if o.arm == name), key=lambda o: o.realised_sparsity)
            x = [o.realised_sparsity for o in mine]
            y = [o.parts[part].over_dense for o in mine]
            axes.plot(x, [e.mean for e in y], **{**look[name], "marker": None})  # type: ignore[arg-type]
            for o, e in zip(mine, y, strict=True):
                colour = look[name]["color"]
                axes.errorbar(
                    o.realised_sparsity,
                    e.mean,
                    yerr=[[e.mean - e.low], [e.high - e.mean]],
                    fmt=str(look[name]["marker"]),
                    color=colour,
                    mfc=colour if o.reached else "white",
                    elinewidth=1,
                    capsize=2,
                    markersize=5.5,
                )
            axes.plot([], [], label=name, **look[name])  # type: ignore[arg-type]
            ends[name] = y[-1].mean
        axes.axhline(0, color="#666666", linewidth=0.8)
        _loss_scale(axes, [v for o in found for v in (o.parts[part].over_dense.low, o.parts[part].over_dense.high)])
        axes.set_title({"before": "before the change", "after": "after the change"}.get(part, part), loc="left")
        axes.set_ylabel("loss over dense, nats")
        _legend(axes, ends)
    axes.set_xlabel("realised sparsity (bars: 95 % over streams; hollow: the wanted sparsity cannot be reached)")
    return figure


def _stack(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _label(outcome: Outcome) -> str:
    return outcome.arm if outcome.reached else f"{outcome.arm} (realises {outcome.realised_sparsity:.2f})"


def _loss_scale(axes: Axes, values: Sequence[float]) -> None:
    """Arms differ by a factor of a hundred: logarithmic, but even around 0, which noise may cross."""
    highest = max(values, default=1.0)
    if highest > 0:
        axes.set_yscale("symlog", linthresh=max(0.02, highest / 50), linscale=0.4)
        ticks = [t for t in (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if t <= 1.2 * highest]
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
