"""Scores against realised sparsity, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from dartprune.evaluation.benchmarks.results import ArmScores
from dartprune.reporting.plot import GREY, look

ACROSS = 3


def curves(arms: Sequence[ArmScores], *, averaged: bool) -> Figure:
    """Draw one panel for each score, or one for their mean; an arm that does not prune is a level line."""
    if averaged:
        panels = {"mean of all scores": {arm.name: arm.mean for arm in arms if arm.scores}}
    else:
        names = dict.fromkeys(name for arm in arms for name in arm.scores)
        panels = {name: {arm.name: arm.scores[name] for arm in arms if name in arm.scores} for name in names}
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.5 * across, 3.5 * down), layout="constrained")
    methods = dict.fromkeys(arm.pruner.name for arm in arms if arm.pruner.prunes)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, values) in zip(grid.flat, panels.items(), strict=False):
        for number, method in enumerate(methods):
            line = [arm for arm in arms if arm.pruner.name == method and arm.name in values]
            sparsities = [arm.tally.realised_sparsity for arm in line]
            axes.plot(sparsities, [values[arm.name] for arm in line], label=method, **look(number))
        for arm in arms:
            if not arm.pruner.prunes and arm.name in values:
                axes.axhline(values[arm.name], color=GREY, linestyle="--", label=arm.pruner.name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("realised sparsity")
        if min(values.values()) > 0 and max(values.values()) > 10 * min(values.values()):
            axes.set_yscale("log")
    grid.flat[0].legend(frameon=False)
    return figure
