"""Writes a study: one page, pictures as PNG and SVG, numbers as JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dartprune.evaluation.stats import Interval
from dartprune.evaluation.study import pictures
from dartprune.evaluation.study.findings import Findings, to_data
from dartprune.evaluation.study.results import Results
from dartprune.evaluation.study.tables import write_tables
from dartprune.reporting.page import Page
from dartprune.reporting.plot import save


def write(results: Results, found: Findings, folder: Path, title: str) -> list[Path]:
    """Write all files of a study into a folder; returns the page, the JSON and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "report.json"
    data.write_text(json.dumps(to_data(results, found), indent=1) + "\n")
    write_tables(results, found, folder)
    drawn = _draw(results, found)
    written = [data]
    for name, (figure, _) in drawn.items():
        for ending in ("png", "svg"):
            save(figure, folder / f"{name}.{ending}")
            written.append(folder / f"{name}.{ending}")
    page = folder / "report.html"
    _page(results, found, drawn, title).write(page)
    return [page, *written]


# ---- pictures


def _draw(results: Results, found: Findings) -> dict[str, tuple[Figure, str]]:
    out = {
        "trajectories": (
            pictures.trajectories(results),
            "Cosine of each window's mean with the centroid of the arm's own first-topic vectors. Vertical lines: the "
            "change of topic (dotted) and the release (in the arm's colour). Bands: 1.96 standard errors over texts.",
        ),
        "divergence": (
            pictures.divergence(results),
            "Cosine of each window's mean with that of the dense model, which reads the same tokens. Below the first "
            "FFN nothing differs.",
        ),
        "losses": (pictures.losses(results), "Loss over dense in each window. Bands: 1.96 standard errors over texts."),
    }
    if found.recovery:
        out["recovery"] = (
            pictures.recovery(results, found.recovery),
            "Above: loss over dense with the frozen mask and with releases. Below: the share of the frozen mask's "
            "loss, and of its distance from the dense vectors, that each release gave back; bars: 95 % intervals.",
        )
    if found.curve:
        out["detector"] = (
            pictures.detector(results, found.curve),
            "What other thresholds of the drift detector would have done, replayed from recorded cosines: each mark is "
            "one setting.",
        )
    shown = results.detecting
    if shown is not None:
        out["single-texts"] = (
            pictures.single_texts(results, shown),
            "What the detector saw in single texts: windows, thresholds, events, and the change of topic.",
        )
        out["turnover"] = (
            pictures.turnover(results, shown),
            "Neurons that events exchanged, layer by layer, and the share of each topic's own best neurons (those that "
            "a prompt of this topic alone would keep) among the kept ones.",
        )
    return out


# ---- the page


def arm_table(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of arms, as text."""
    columns = [
        "arm", "texts", "realised sparsity", "loss over dense before", "after", "cosine with first topic before",
        "after", "cosine with dense before", "after", "events a text before", "after", "noticed", "median delay",
        "alarms / 1,000",
    ]  # fmt: skip
    rows = [
        [
            row.arm,
            f"{row.texts} {'change' if row.kind == 'change' else 'keep'}",
            f"{row.realised_sparsity:.3f}",
            str(row.excess_before),
            str(row.excess_after),
            *(f"{v:.3f}" for v in (row.to_first_before, row.to_first_after, row.to_dense_before, row.to_dense_after)),
            f"{row.events_before:.2f}",
            f"{row.events_after:.2f}",
            f"{row.noticed}" if row.kind == "change" else "",
            "" if row.delay is None else f"{row.delay:g}",
            "" if row.false_alarms is None else f"{row.false_alarms:.2f}",
        ]
        for row in found.arms
    ]
    return columns, rows


def recovery_table(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of releases, as text."""
    columns = [
        "released at", "tokens judged", "loss over dense, frozen", "released", "regained", "cosine with dense, frozen",
        "released", "regained", "half of it after", "left at the end", "verdict",
    ]  # fmt: skip
    rows = [
        [
            str(row.release),
            str(row.tokens),
            str(row.static),
            str(row.released),
            str(row.regained),
            f"{row.similar_static:.3f}",
            f"{row.similar:.3f}",
            str(row.similarity_regained),
            "never" if row.half_time is None else f"{row.half_time} tokens",
            str(row.lost),
            row.verdict,
        ]
        for row in found.recovery
    ]
    return columns, rows


def _page(results: Results, found: Findings, drawn: Mapping[str, tuple[Figure, str]], title: str) -> Page:
    s = results.settings
    page = Page(title)
    page.text(found.verdict)
    page.table(("claim", "answer", "figures"), [(c.claim, c.answer, c.figures) for c in found.claims])
    change = results.records["dense", "change"]
    page.text(
        f"{change.texts} texts; decoded tokens are counted from 1, the second topic begins after token {s.before}, the "
        f"text ends at {s.steps}. Windows have {s.window} tokens; the overlap of largest dimensions counts "
        f"{results.top}. Every arm prunes from the first decoded token on, and the dense model reads the same tokens "
        "beside it."
    )
    for note in found.notes:
        page.text(note)
    page.heading("Arms")
    page.table(
        *arm_table(found), caption="Loss over dense in nats with 95 % intervals over texts; cosines at the last layer."
    )
    for name in ("losses", "trajectories", "divergence"):
        page.picture(*drawn[name])
    if found.recovery:
        page.heading("Recovery")
        page.table(*recovery_table(found))
        page.picture(*drawn["recovery"])
    if "detector" in drawn or "single-texts" in drawn:
        page.heading("Detection")
    if "detector" in drawn:
        page.text(
            "Assumed in the replay: the mask and the reference stay the prompt's, which is exact up to a detector's "
            "first event; so only first events count, and a text is watched up to its first event."
        )
        page.picture(*drawn["detector"])
    if "single-texts" in drawn:
        page.picture(*drawn["single-texts"])
        page.heading("Neurons")
        page.picture(*drawn["turnover"])
        kept = [row for row in found.neurons if row["kind"] == "change"]
        if kept:
            page.table(list(kept[0]), [[_short(v) for v in row.values()] for row in kept])
    if found.quality:
        page.heading("Text")
        rows = [
            (arm, part, *map(_short, v.values())) for arm, parts in found.quality.items() for part, v in parts.items()
        ]
        first = next(iter(next(iter(found.quality.values())).values()))
        page.table(("arm", "part", *first), rows, caption="Beside the text that the dense arm wrote.")
    page.settings({"settings": s.to_dict(), "arms": {arm.name: arm.pruner.to_dict() for arm in results.arms}})
    return page


def _short(value: Any) -> str:
    if isinstance(value, Interval):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
