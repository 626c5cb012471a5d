"""Pictures and page of a layer study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from dartprune.evaluation.benchmarks.results import Table
from dartprune.evaluation.layers.run import Layers
from dartprune.reporting.page import Page
from dartprune.reporting.plot import BLUE, GREEN, GREY, ORANGE, save


def curves(found: Layers) -> Figure:
    """Loss over dense against the share of neurons kept: each layer alone, and several at once."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = sorted(range(len(found.keeps)), key=lambda k: found.keeps[k])
    keeps = [found.keeps[k] for k in order]
    shades = colormaps["viridis"]
    for layer, losses in enumerate(found.alone):
        colour = shades(layer / max(1, len(found.alone) - 1))
        left.plot(keeps, [losses[k] for k in order], marker=".", color=colour, label=f"layer {layer}")
    for (name, losses), mark in zip(found.groups.items(), "osv^DPX*" * 9, strict=False):
        right.plot(keeps, [losses[k] for k in order], marker=mark, label=name)
    left.set_title("one layer pruned", loc="left")
    right.set_title("several layers pruned", loc="left")
    for axes in (left, right):
        axes.set_xlabel("share of neurons kept")
        axes.set_ylabel("loss over dense (nats)")
        axes.axhline(0, color=GREY, linewidth=0.8)
    if len(found.alone) <= 12:
        left.legend(frameon=False, fontsize="small")
    right.legend(frameon=False, fontsize="small")
    return figure


def foretelling(found: Layers) -> Figure:
    """Sensitivity beside the measured damage, at the share kept in the middle."""
    k = _middle(found)
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, measured, title) in zip(
        figure.subplots(1, 2),
        (
            ("alone", found.alone, "loss over dense with this layer alone pruned"),
            ("spared", found.spared, "loss that sparing this layer saves"),
        ),
        strict=True,
    ):
        values = [row[k] for row in measured]
        axes.plot(found.sensitivity, values, "o", color=BLUE)
        for layer, (x, y) in enumerate(zip(found.sensitivity, values, strict=True)):
            axes.annotate(str(layer), (x, y), textcoords="offset points", xytext=(4, 3), fontsize="small")
        axes.set_xlabel("sensitivity S of the layer")
        axes.set_ylabel("nats")
        if min(found.sensitivity) > 0 and max(found.sensitivity) > 10 * min(found.sensitivity):
            axes.set_xscale("log")  # a first layer's may be a hundred times the others'
        rho = found.foretold[name][k]
        said = "constant" if rho is None else f"rank correlation {rho:.2f}"
        axes.set_title(f"{title}, {found.keeps[k]:.0%} kept\n{said}", loc="left", fontsize="medium")
    return figure


def overlap(found: Layers) -> Figure:
    """Kept neurons in common: by layer, and by distance along a text."""
    data = found.overlap
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


def tables(found: Layers) -> list[Table]:
    """For people."""
    k = _middle(found)
    keep = f"{found.keeps[k]:.0%}"
    rows = [
        [
            str(layer),
            f"{found.sensitivity[layer]:.3f}",
            f"{found.alone[layer][k]:.3f} ± {found.errors[f'layer {layer}'][k]:.3f}",
            f"{found.spared[layer][k]:.3f}",
            *("-" if found.overlap[key] is None else f"{found.overlap[key][layer]:.2f}" for key in _PAIRS),
        ]
        for layer in range(len(found.sensitivity))
    ]
    columns = ["layer", "sensitivity", f"loss, {keep} kept", "loss that sparing saves", *_PAIRS.values()]
    shares = [f"{value:.0%} kept" for value in found.keeps]
    several = [
        [name, *(f"{v:.3f} ± {e:.3f}" for v, e in zip(losses, found.errors[name], strict=True))]
        for name, losses in found.groups.items()
    ]
    ranks = [
        [said, *("-" if rho is None else f"{rho:.2f}" for rho in found.foretold[name])]
        for name, said in (("alone", "one layer pruned"), ("spared", "one layer spared"))
    ]
    return [
        Table("one layer at a time (loss over dense in nats)", columns, rows),
        Table("several layers (loss over dense in nats)", ["", *shares], several),
        Table("rank correlation of sensitivity with the damage", ["", *shares], ranks),
    ]


def write(found: Layers, folder: Path, name: str, settings: dict[str, Any]) -> list[Path]:
    """Write results.json, the pictures and report.html into a folder."""
    data = folder / "results.json"
    data.write_text(json.dumps({"model": name, "settings": settings, **found.to_dict()}, indent=1) + "\n")
    written = [data]
    page = Page(f"Layers of {name}")
    page.text(
        "Masks are made from each text's prompt and stay; the tokens after it are decoded teacher-forced. Loss over "
        "dense in nats, with standard errors over texts."
    )
    for table in tables(found):
        page.heading(table.title)
        page.table(table.columns, table.rows)
    for stem, make, caption in (
        ("curves", curves, "Loss over dense against the share of neurons kept."),
        ("sensitivity", foretelling, "Does the sensitivity of a layer foretell what pruning it costs?"),
        ("overlap", overlap, f"Kept neurons in common at {found.overlap['keep']:.0%} kept."),
    ):
        figure = make(found)
        page.picture(figure, caption)
        written.append(folder / f"{stem}.png")
        save(figure, written[-1])
    page.settings(settings)
    written.append(folder / "report.html")
    page.write(written[-1])
    return written


_PAIRS = {"same_domain": "in common, one domain", "other_domain": "two domains"}


def _middle(found: Layers) -> int:
    """Number of the share kept that is shown where only one is."""
    return sorted(range(len(found.keeps)), key=lambda k: found.keeps[k])[len(found.keeps) // 2]
