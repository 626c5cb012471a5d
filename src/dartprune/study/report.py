"""Writes a study: one page, pictures as PNG and SVG, numbers as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dartprune.page import Page
from dartprune.plot import save
from dartprune.study import analysis, pictures
from dartprune.study.analysis import ArmRow, Claim, Recovery
from dartprune.study.detector import CurvePoint
from dartprune.study.measures import TOKEN_MEASURES, WINDOW_MEASURES
from dartprune.study.results import Results
from dartprune.study.stats import Interval, band

Quality = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> part of the text -> figure


@dataclass
class Findings:
    """What a study has found; `notes` say what must be known to read it."""

    arms: list[ArmRow]
    recovery: list[Recovery]
    verdict: str
    claims: list[Claim]
    curve: list[CurvePoint]
    neurons: list[dict[str, Any]]
    quality: Quality
    notes: list[str]


def find(results: Results, quality: Quality | None = None, notes: Sequence[str] = ()) -> Findings:
    """Draw the conclusions; `quality` of written texts comes from `quality.py`."""
    rows = analysis.recoveries(results)
    return Findings(
        arms=analysis.arm_rows(results),
        recovery=rows,
        verdict=analysis.verdict(rows, results.settings.recovered),
        claims=analysis.claims(results, rows),
        curve=analysis.detector_curve(results),
        neurons=analysis.neuron_rows(results),
        quality=quality or {},
        notes=list(notes),
    )


def to_data(results: Results, found: Findings) -> dict[str, Any]:
    """Everything but the series, as plain data; what is no number is null."""
    data = {
        "settings": results.settings.to_dict(),
        "arms_run": {arm.name: arm.pruner.to_dict() for arm in results.arms},
        "points": [point.name for point in results.points],
        "dimensions_of_overlap": results.top,
        "texts": results.names,
        "backends": sorted({name for record in results.records.values() for name in record.backends}),
        "verdict": found.verdict,
        "claims": analysis.as_data(found.claims),
        "arms": analysis.as_data(found.arms),
        "recovery": analysis.as_data(found.recovery),
        "detector_curve": analysis.as_data(found.curve),
        "neurons": found.neurons,
        "text_quality": {arm: {part: dict(v) for part, v in parts.items()} for arm, parts in found.quality.items()},
        "statistics_bytes": max(record.held for record in results.records.values()),
        "notes": found.notes,
    }
    plain: dict[str, Any] = _finite(data)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def write(results: Results, found: Findings, folder: Path, title: str) -> list[Path]:
    """Write all files of a study into a folder; returns the page, the JSON and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "report.json"
    data.write_text(json.dumps(to_data(results, found), indent=1) + "\n")
    _write_tables(results, found, folder)
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


# ---- tables


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One level: an interval becomes three columns."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {key: value["value"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
        else:
            out[key] = value
    return out


def _csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A table; nothing is written for no rows."""
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(iterator)


def _write_tables(results: Results, found: Findings, folder: Path) -> None:
    for name, rows in (("arms", found.arms), ("recovery", found.recovery), ("claims", found.claims)):
        _csv(folder / f"{name}.csv", [_flat(row) for row in analysis.as_data(rows)])
    _csv(folder / "detector.csv", analysis.as_data(found.curve))
    _csv(folder / "neurons.csv", found.neurons)
    _csv(
        folder / "quality.csv",
        [{"arm": a, "part": p, **v} for a, parts in found.quality.items() for p, v in parts.items()],
    )
    _csv(folder / "events.csv", _event_rows(results))
    _csv(folder / "texts.csv", _text_rows(results))
    _csv(folder / "windows.csv", _window_rows(results))
    _csv(folder / "tokens.csv", _token_rows(results))
    (folder / "series.json").write_text(json.dumps(_series(results)) + "\n")


def _event_rows(results: Results) -> Iterable[dict[str, Any]]:
    for record in results.records.values():
        moved = {(row["stream"], row["decoded"]): row for row in record.neurons}
        for number, events in enumerate(record.events):
            for event in events:
                row = moved.get((number, event["decoded"]), {})
                yield {
                    "arm": record.arm.name,
                    "texts": record.kind,
                    "text": number,
                    "topics": results.names[record.kind][number],
                    **{key: event[key] for key in ("kind", "decoded", "similarity", "threshold")},
                    "added_by_layer": " ".join(map(str, row.get("added", []))),
                    "dropped_by_layer": " ".join(map(str, row.get("dropped", []))),
                }


def _text_rows(results: Results) -> Iterable[dict[str, Any]]:
    before = results.settings.before
    for record in results.records.values():
        excess, alarms = results.excess(record), record.alarms()
        for number in range(record.texts):
            yield {
                "arm": record.arm.name,
                "texts": record.kind,
                "text": number,
                "topics": results.names[record.kind][number],
                "realised_sparsity": float(record.realised[number]),
                "dense_loss": float(record.dense_loss[:, number].mean()),
                "excess_before": float(excess[:before, number].mean()),
                "excess_after": float(excess[before:, number].mean()),
                "events": len(alarms[number]),
                "first_event_after": next((at for at in alarms[number] if at > before), None),
            }


def _window_rows(results: Results) -> Iterable[dict[str, Any]]:
    for record in results.records.values():
        for place, point in enumerate(results.points):
            for name in WINDOW_MEASURES:
                for number, (mean, low, high) in enumerate(zip(*band(record.measure(name, place)), strict=True)):
                    yield {
                        "arm": record.arm.name,
                        "texts": record.kind,
                        "decoded": (number + 1) * results.settings.window,
                        "layer": point.layer,
                        "space": point.space,
                        "measure": name,
                        "mean": f"{mean:.6g}",
                        "low": f"{low:.6g}",
                        "high": f"{high:.6g}",
                    }


def _token_rows(results: Results) -> Iterable[dict[str, Any]]:
    for record in results.records.values():
        own, dense = record.loss.mean(1), record.dense_loss.mean(1)
        for step in range(results.settings.steps):
            for place, point in enumerate(results.points):
                values = record.tokens[step, place]
                yield {
                    "arm": record.arm.name,
                    "texts": record.kind,
                    "decoded": step + 1,
                    "layer": point.layer,
                    "space": point.space,
                    "loss": f"{own[step]:.6g}",
                    "dense_loss": f"{dense[step]:.6g}",
                    **{name: f"{values[i, 0]:.6g}" for i, name in enumerate(TOKEN_MEASURES)},
                    **{f"{name}_sd": f"{values[i, 1]:.6g}" for i, name in enumerate(TOKEN_MEASURES)},
                }


def _series(results: Results) -> list[dict[str, Any]]:
    """Means over texts, window by window."""
    s = results.settings
    out: list[dict[str, Any]] = []
    for record in results.records.values():
        excess = results.excess(record).reshape(s.windows, s.window, -1).mean((1, 2))
        measures = {
            point.name: {name: _listed(record.measure(name, place).mean(1)) for name in WINDOW_MEASURES}
            for place, point in enumerate(results.points)
        }
        kept = {
            topic: _listed(record.overlap[:, i].mean((1, 2))) for i, topic in enumerate(("first_topic", "second_topic"))
        }
        out.append(
            {
                "arm": record.arm.name,
                "texts": record.kind,
                "window": s.window,
                "excess_loss": _listed(excess),
                "own_neurons_kept": kept,
                "measures": measures,
            }
        )
    return out


def _listed(values: Any) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in np.asarray(values).tolist()]


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
