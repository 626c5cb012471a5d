"""A frontier on disk and on the terminal: one picture, one table, results.json and results.csv, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dartprune.evaluation.frontier.run import DENSE, PARTS, Frontier, Measured
from dartprune.gguf_files import GGUF
from dartprune.reporting.frame import Frame
from dartprune.reporting.page import TextTable
from dartprune.reporting.plot import GREY, legend_beside, look, loss_axis

CEILING, BEST = "†", "•"
EXPLAINED = (
    "Every point decodes the same token streams, teacher-forced: the prompt without its last token runs dense and is "
    "traced, every later token is computed as a decoded one. Losses are in nats a token, minus those of the model in "
    "bfloat16 on the same tokens; brackets hold 95 % of the means over streams drawn anew. Bits: read for each weight "
    "of the FFN and decoded token, scales, lows and what a selector reads counted, and dense tokens too. Only the FFN "
    "is in the format named; of a GGUF file everything is. int2, int3 and int5 to int7 are rounded to the nearest, "
    f"and no method saves on them. {BEST}: nothing that reads as little loses less. {CEILING}: computes everything to "
    "know what it could have left out, a ceiling; its bits are those of all weights."
)


def write(found: Frontier, folder: Path, title: str) -> dict[str, str]:
    """Write every file of a frontier; returns their paths by name."""
    frame = Frame(folder, title)
    frame.json("results", found.to_dict())
    frame.csv("results", [_flat(point) for point in found.points])
    page, s = frame.page, found.settings
    page.text(EXPLAINED)
    page.text(
        f"{s['streams']} streams from {', '.join(s['domains'])}: {s['prompt']} tokens of prompt, then "
        f"{s['lengths'][0] - s['prompt']} of the same topic and {s['lengths'][1]} of another, of which the first "
        f"{s['left_out_after_change']} are not scored."
    )
    frame.picture("frontier", picture(found), "Loss over bfloat16 against bits read for each FFN weight.")
    page.table(*table(found.points))
    for remark in notes(found):
        page.text(remark)
    return {path.name: str(path) for path in frame.close(s)}


def table(points: Sequence[Measured]) -> TextTable:
    """One row a point, by the bits that it reads."""
    columns = ["weights", "method", "realised", "bits", "loss over bfloat16", *PARTS]
    rows = []
    for p in sorted(points, key=lambda p: -p.bits):
        method = p.method + (f" {p.sparsity:g}" if p.sparsity else "") + (CEILING if p.ceiling else "")
        row = [_short(p.weights), method + (f" {BEST}" if p.best else ""), f"{p.realised:.3f}", f"{p.bits:.2f}"]
        rows.append([*row, str(p.loss), *(f"{p.parts[name].value:.3f}" for name in PARTS)])
    return columns, rows


def brief(points: Sequence[Measured]) -> TextTable:
    """What of `table` fits on a terminal."""
    columns, rows = table(points)
    kept = len(columns) - len(PARTS)
    return columns[:kept], [row[:kept] for row in rows]


def notes(found: Frontier) -> list[str]:
    """Everything a reader must know beside the figures."""
    out = [f"Left out: {why}." for why in found.left_out]
    for p in found.points:
        if _is_file(p) and p.loss.low == p.loss.high == 0:
            out.append(
                f"{_short(p.weights)} gives the very losses of the model: its weights were unpacked from this file."
            )
    for name in dict.fromkeys(p.method for p in found.points):
        said = dict.fromkeys(note for p in found.points if p.method == name for note in p.notes)
        out += [f"{name}: {note}." for note in said]
    return out


def picture(found: Frontier) -> Figure:
    """Loss against bits read: the formats alone in one line, each method on each format in another."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[Measured]] = {}
    alone = [p for p in found.points if p.method == DENSE]
    for p in found.points:
        if p.method != DENSE:
            start = [q for q in alone if q.weights == p.weights and not p.ceiling]
            lines.setdefault((p.method, p.weights), list(start)).append(p)
    methods = list(dict.fromkeys(method for method, _ in lines))
    formats = list(dict.fromkeys(weights for _, weights in lines))
    rounded = sorted((p for p in alone if not _is_file(p)), key=lambda p: p.bits)
    axes.plot(
        [p.bits for p in rounded], [p.loss.value for p in rounded], color="black", marker="s", label="formats alone"
    )
    for p in alone:
        if _is_file(p):
            axes.plot([p.bits], [p.loss.value], color="black", marker="*", markersize=10, linestyle="none")
        place = (p.bits, p.loss.value)
        axes.annotate(_short(p.weights), place, xytext=(4, 6), textcoords="offset points", fontsize=8)
    for (method, weights), points in lines.items():
        style = look(methods.index(method)) | {"linestyle": look(formats.index(weights))["linestyle"]}
        x, y = [p.bits for p in points], [p.loss for p in points]
        label = f"{method} on {weights}" + (" (ceiling)" if points[-1].ceiling else "")
        axes.plot(x, [e.value for e in y], label=label, markersize=5, markevery=slice(len(x) > 1, None), **style)
        axes.vlines(x, [e.low for e in y], [e.high for e in y], color=style["color"], lw=1)
    bounds = [end for p in found.points for end in (p.loss.low, p.loss.high)]
    loss_axis(axes, "loss over bfloat16, nats a token", min(bounds), max(bounds))
    axes.set_xscale("log", base=2)
    ticks = [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16) if min(p.bits for p in found.points) / 1.3 <= t]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_xlabel("bits read for each FFN weight and token (bars: 95 % over streams)")
    axes.spines[["top", "right"]].set_color(GREY)
    legend_beside(axes)
    return figure


def _is_file(point: Measured) -> bool:
    return point.weights.endswith(GGUF)


def _short(weights: str) -> str:
    return Path(weights).name


def _flat(p: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"weights": _short(p.weights), "method": p.method, "sparsity": p.sparsity}
    row |= {"realised": p.realised, "bits": p.bits, "ceiling": p.ceiling, "best": p.best}
    for name, figure in (("loss", p.loss), *p.parts.items()):
        row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return row
