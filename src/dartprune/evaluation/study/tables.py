"""The tables of a study as CSV files, and its curves window by window as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dartprune.evaluation.stats import band
from dartprune.evaluation.study import analysis
from dartprune.evaluation.study.findings import Findings
from dartprune.evaluation.study.measures import TOKEN_MEASURES, WINDOW_MEASURES
from dartprune.evaluation.study.results import Results


def write_tables(results: Results, found: Findings, folder: Path) -> None:
    """Write every table of a study as CSV, and `series.json`, into a folder that is there."""
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
