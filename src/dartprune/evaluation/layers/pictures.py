"""Pictures of a layer study."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from dartprune.evaluation.layers.run import LayerStudy
from dartprune.reporting.plot import BLUE, GREEN, GREY, ORANGE, look, shades

FEW = 12  # layers that a legend, or numbers beside points, can name


def curves(study: LayerStudy) -> Figure:
    """Loss over dense against the share of neurons kept: each layer alone, and several at once."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = sorted(range(len(study.keeps)), key=lambda k: study.keeps[k])
    keeps = [study.keeps[k] for k in order]
    for layer, (losses, colour) in enumerate(zip(study.alone, shades(len(study.alone)), strict=True)):
        left.plot(keeps, [losses[k] for k in order], marker=".", color=colour, label=f"layer {layer}")
    for number, (name, losses) in enumerate(study.groups.items()):
        right.plot(keeps, [losses[k] for k in order], label=name, **look(number))
    left.set_title("one layer pruned", loc="left")
    right.set_title("several layers pruned", loc="left")
    for axes in (left, right):
        axes.set_xlabel("share of neurons kept")
        axes.set_ylabel("loss over dense (nats)")
        axes.axhline(0, color=GREY, linewidth=0.8)
    layers = len(study.alone)
    if layers <= FEW:
        left.legend(frameon=False, fontsize="small")
    else:
        scale = ScalarMappable(Normalize(0, layers - 1), ListedColormap(shades(layers)))
        figure.colorbar(scale, ax=left, label="layer")
    right.legend(frameon=False, fontsize="small")
    return figure


def foretelling(study: LayerStudy) -> Figure:
    """Sensitivity beside the measured damage, at the share kept in the middle."""
    k = study.middle
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, measured, title) in zip(
        figure.subplots(1, 2),
        (
            ("alone", study.alone, "loss over dense with this layer alone pruned"),
            ("spared", study.spared, "loss that sparing this layer saves"),
        ),
        strict=True,
    ):
        values = [row[k] for row in measured]
        axes.plot(study.sensitivity, values, "o", color=BLUE)
        for layer in _named(study.sensitivity, values):
            at = study.sensitivity[layer], values[layer]
            axes.annotate(str(layer), at, textcoords="offset points", xytext=(4, 3), fontsize="small")
        axes.set_xlabel("sensitivity S of the layer")
        axes.set_ylabel("nats")
        if min(study.sensitivity) > 0 and max(study.sensitivity) > 10 * min(study.sensitivity):
            axes.set_xscale("log")  # a first layer's may be a hundred times the others'
        rho = study.foretold[name][k]
        said = "constant" if rho is None else f"rank correlation {rho:.2f}"
        axes.set_title(f"{title}, {study.keeps[k]:.0%} kept\n{said}", loc="left", fontsize="medium")
    return figure


def _named(across: Sequence[float], up: Sequence[float]) -> list[int]:
    """Layers whose numbers fit: all of a few, else those that stand out in either direction."""
    layers = range(len(up))
    if len(up) <= FEW:
        return list(layers)
    most = [layer for values in (across, up) for layer in sorted(layers, key=lambda i: -values[i])[: FEW // 3]]
    return sorted({0, len(up) - 1, *most})


def overlap(study: LayerStudy) -> Figure:
    """Kept neurons in common: by layer, and by distance along a text."""
    data = study.overlap
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label, colour, mark in (
        ("same_domain", "two texts of one domain", BLUE, "o"),
        ("other_domain", "texts of two domains", ORANGE, "s"),
    ):
        if data[key] is not None:
            left.plot(range(len(data[key])), data[key], marker=mark, color=colour, label=label)
    left.set_xlabel("layer")
    if data["over_time"]:
        right.plot(range(1, len(data["over_time"]) + 1), data["over_time"], marker="o", color=GREEN, label="one text")
    right.set_xlabel(f"distance of two pieces of a text (in pieces of {data['piece']} tokens)")
    for axes in (left, right):
        axes.axhline(data["chance"], color=GREY, linestyle="--", label="chance")
        axes.set_ylabel("share of kept neurons in common")
        axes.legend(frameon=False, fontsize="small")
    return figure
