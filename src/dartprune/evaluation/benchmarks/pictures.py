"""Scores against realised sparsity, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from dartprune.evaluation.benchmarks.results import Outcome
from dartprune.reporting.plot import BLUE, GREEN, GREY, ORANGE

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "osv^DP"
ACROSS = 3


def curves(outcomes: Sequence[Outcome], *, averaged: bool) -> Figure:
    """Draw one panel for each score, or one for their mean.

    Args:
        outcomes: of the arms; one that does not prune is a level line.
        averaged: draw the mean of all scores, where these are of one kind.
    """
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
    panels: dict[str, Mapping[str, float]]
    if averaged:
        panels = {"mean of all scores": {o.name: sum(o.scores.values()) / len(o.scores) for o in outcomes if o.scores}}
    else:
        panels = {name: {o.name: o.scores[name] for o in outcomes if name in o.scores} for name in names}
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.5 * across, 3.5 * down), layout="constrained")
    methods = list(dict.fromkeys(outcome.pruner.name for outcome in outcomes if outcome.pruner.prunes))
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, values) in zip(grid.flat, panels.items(), strict=False):
        for number, method in enumerate(methods):
            line = [o for o in outcomes if o.pruner.name == method and o.name in values]
            axes.plot(
                [o.tally.realised_sparsity for o in line],
                [values[o.name] for o in line],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKS[number % len(MARKS)],
                label=method,
            )
        for o in outcomes:
            if not o.pruner.prunes and o.name in values:
                axes.axhline(values[o.name], color=GREY, linestyle="--", label=o.pruner.name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("realised sparsity")
        if min(values.values()) > 0 and max(values.values()) > 10 * min(values.values()):
            axes.set_yscale("log")
    grid.flat[0].legend(frameon=False)
    return figure
