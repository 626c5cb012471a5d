"""The tables of a study: for people as text, and for machines as CSV files with the curves window by window as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dartprune.evaluation.stats import Interval, band
from dartprune.evaluation.study.findings import Findings
from dartprune.evaluation.study.measures import TOKEN_MEASURES, WINDOW_MEASURES
from dartprune.evaluation.study.results import Record, Results
from dartprune.reporting.frame import Frame
from dartprune.reporting.page import TextTable

Rows = Iterable[dict[str, Any]]


def arm_table(findings: Findings) -> TextTable:
    """The table of arms."""
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
        for row in findings.arms
    ]
    return columns, rows


def recovery_table(findings: Findings) -> TextTable:
    """The table of releases."""
    columns = [
        "released at", "tokens judged", "loss over dense, frozen", "released", "regained", "cosine with dense, frozen",
        "released", "regained", "half of it after", "left at the end", "verdict",
    ]  # fmt: skip
    rows = [
        [
            *map(str, (row.release, row.tokens, row.frozen, row.released, row.regained)),
            f"{row.similar_frozen:.3f}",
            f"{row.similar:.3f}",
            str(row.similarity_regained),
            "never" if row.half_time is None else f"{row.half_time} tokens",
            str(row.lost),
            row.verdict,
        ]
        for row in findings.recovery
    ]
    return columns, rows


def escape_table(findings: Findings) -> TextTable:
    """The table of repetition after releases."""
    columns = ["released at", "tokens judged", "4-grams that return: dense", "frozen", "released", "fewer"]
    return columns, [
        [*map(str, (row.release, row.tokens, row.dense, row.frozen, row.released, row.fewer))]
        for row in findings.escapes
    ]


def write_tables(results: Results, findings: Findings, frame: Frame) -> None:
    """Write every table of a study as CSV, and `series.json`."""
    frame.csv("arms", _flat(findings.arms))
    frame.csv("recovery", _flat(findings.recovery))
    if findings.escapes:
        frame.csv("escapes", _flat(findings.escapes))
    frame.csv("claims", _flat(findings.claims))
    frame.csv("detector", _flat(findings.curve))
    frame.csv("neurons", findings.neurons)
    quality = findings.quality.items()
    frame.csv("quality", [{"arm": arm, "part": part, **v} for arm, parts in quality for part, v in parts.items()])
    for name, rows in (("events", _events), ("texts", _texts), ("windows", _windows), ("tokens", _tokens)):
        frame.csv(name, (row for record in results.records.values() for row in rows(results, record)))
    frame.json("series", [_series(results, record) for record in results.records.values()], indent=None)


def _flat(rows: Sequence[Any]) -> Rows:
    """Dataclasses on one level: an interval becomes three columns."""
    for row in rows:
        out: dict[str, Any] = {}
        for key, value in vars(row).items():
            if isinstance(value, Interval):
                out |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
            else:
                out[key] = value
        yield out


def _head(record: Record) -> dict[str, Any]:
    return {"arm": record.arm.name, "texts": record.kind}


def _events(results: Results, record: Record) -> Rows:
    moved = {(row["stream"], row["decoded"]): row for row in record.neurons}
    for number, events in enumerate(record.events):
        for event in events:
            row = moved.get((number, event["decoded"]), {})
            yield {
                **_head(record),
                "text": number,
                "topics": results.names[record.kind][number],
                **{key: event[key] for key in ("kind", "decoded", "similarity", "threshold")},
                **{f"{key}_by_layer": " ".join(map(str, row.get(key, []))) for key in ("added", "dropped")},
            }


def _texts(results: Results, record: Record) -> Rows:
    before = results.settings.before
    excess, alarms = results.excess(record), record.alarms()
    for number in range(record.texts):
        yield {
            **_head(record),
            "text": number,
            "topics": results.names[record.kind][number],
            "realised_sparsity": float(record.realised[number]),
            "dense_loss": float(np.delete(record.dense_loss[:, number], results.settings.join).mean()),
            "excess_before": float(np.nanmean(excess[:before, number])),
            "excess_after": float(np.nanmean(excess[before:, number])),
            "events": len(alarms[number]),
            "first_event_after": next((at for at in alarms[number] if at > before), None),
        }


def _windows(results: Results, record: Record) -> Rows:
    for place, point in enumerate(results.points):
        for name in WINDOW_MEASURES:
            for number, ends in enumerate(zip(*band(record.measure(name, place)), strict=True), 1):
                at = {"decoded": number * results.settings.window, "layer": point.layer, "space": point.space}
                figures = {key: f"{end:.6g}" for key, end in zip(("mean", "low", "high"), ends, strict=True)}
                yield {**_head(record), **at, "measure": name, **figures}


def _tokens(results: Results, record: Record) -> Rows:
    own, dense = record.loss.mean(1), record.dense_loss.mean(1)
    for step in range(results.settings.steps):
        loss = {"loss": f"{own[step]:.6g}", "dense_loss": f"{dense[step]:.6g}"}
        for point, values in zip(results.points, record.tokens[step], strict=True):
            at = {"decoded": step + 1, "layer": point.layer, "space": point.space}
            figures = {name: f"{values[i, 0]:.6g}" for i, name in enumerate(TOKEN_MEASURES)}
            spread = {f"{name}_sd": f"{values[i, 1]:.6g}" for i, name in enumerate(TOKEN_MEASURES)}
            yield {**_head(record), **at, **loss, **figures, **spread}


def _series(results: Results, record: Record) -> dict[str, Any]:
    """Means over texts, window by window."""
    s = results.settings
    topics = enumerate(("first_topic", "second_topic"))
    return {
        **_head(record),
        "window": s.window,
        "excess_loss": _listed(results.windowed_excess(record).mean(1)),
        "own_neurons_kept": {topic: _listed(record.overlap[:, i].mean((1, 2))) for i, topic in topics},
        "measures": {
            point.name: {name: _listed(record.measure(name, place).mean(1)) for name in WINDOW_MEASURES}
            for place, point in enumerate(results.points)
        },
    }


def _listed(values: Any) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in np.asarray(values).tolist()]
