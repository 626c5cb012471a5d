"""What a study has found: its records drawn together, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from dartprune.evaluation.stats import Interval
from dartprune.evaluation.study.claims import Claim, claims
from dartprune.evaluation.study.detector import CurvePoint, curve
from dartprune.evaluation.study.escapes import Escape
from dartprune.evaluation.study.recovery import Recovery, recoveries, verdict
from dartprune.evaluation.study.results import Record, Results

Quality = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> part of the text -> figure


@dataclass(frozen=True)
class ArmRow:
    """One arm on one kind of text. Loss over dense in nats; cosines at the leading point; events for one text.

    delay: median tokens from the change to the first event after it, over the texts that have one (noticed of them).
    false_alarms: events for 1,000 decoded tokens, on one-topic text only.
    """

    arm: str
    kind: str
    texts: int
    realised_sparsity: float
    excess_before: Interval
    excess_after: Interval
    to_first_before: float
    to_first_after: float
    to_dense_before: float
    to_dense_after: float
    events_before: float
    events_after: float
    noticed: int
    delay: float | None
    false_alarms: float | None


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
    escapes: list[Escape]


def find(
    results: Results,
    quality: Quality | None = None,
    notes: Sequence[str] = (),
    escapes: Sequence[Escape] = (),
) -> Findings:
    """Draw the conclusions; `quality` and `escapes` of written texts come from the modules of these names."""
    rows = recoveries(results)
    return Findings(
        arms=[_arm_row(results, record) for record in results.records.values()],
        recovery=rows,
        verdict=verdict(rows, results.settings.recovered),
        claims=claims(results, rows),
        curve=detector_curve(results),
        neurons=[row for record in results.records.values() for row in _neuron_rows(results, record)],
        quality=quality or {},
        notes=list(notes),
        escapes=list(escapes),
    )


def _arm_row(results: Results, record: Record) -> ArmRow:
    s = results.settings
    excess = results.excess(record)
    windows = s.before // s.window
    first, dense = (record.measure(f"cosine_to_{what}", results.lead) for what in ("first_topic", "dense"))
    alarms = record.alarms()
    after = [[at for at in text if at > s.before] for text in alarms]
    delays = [text[0] - s.before for text in after if text]
    return ArmRow(
        arm=record.arm.name,
        kind=record.kind,
        texts=record.texts,
        realised_sparsity=float(record.realised.mean()),
        excess_before=results.interval(np.nanmean(excess[: s.before], 0)),
        excess_after=results.interval(np.nanmean(excess[s.before :], 0)),
        to_first_before=float(first[:windows].mean()),
        to_first_after=float(first[windows:].mean()),
        to_dense_before=float(dense[:windows].mean()),
        to_dense_after=float(dense[windows:].mean()),
        events_before=sum(at <= s.before for text in alarms for at in text) / record.texts,
        events_after=sum(map(len, after)) / record.texts,
        noticed=len(delays),
        delay=float(np.median(delays)) if delays and record.kind == "change" else None,
        false_alarms=1000 * sum(map(len, alarms)) / (record.texts * s.steps) if record.kind == "control" else None,
    )


def detector_curve(results: Results) -> list[CurvePoint]:
    """Delay against false alarms over thresholds; empty without a frozen arm on both kinds of text."""
    frozen, steady, s = results.frozen, results.steady, results.settings
    if frozen is None or steady is None or not frozen.judged.shape[0]:
        return []
    window = frozen.arm.pruner.detector.window
    return curve(frozen.judged, steady.judged, window, before=s.before, steps=s.steps, early=s.early)


def _neuron_rows(results: Results, record: Record) -> list[dict[str, Any]]:
    """For each layer of an arm that prunes: mean neurons added and dropped at an event, and own best neurons in it."""
    cut = results.settings.before // results.settings.window
    rows: list[dict[str, Any]] = []
    for layer, count in enumerate(results.neurons if record.arm.pruner.prunes else []):
        row = {"arm": record.arm.name, "kind": record.kind, "layer": layer, "neurons": count}
        row["events"] = len(record.neurons)
        for name in ("added", "dropped"):
            row[name] = float(np.mean([event[name][layer] for event in record.neurons])) if record.neurons else 0.0
        shares = record.overlap[:, :, layer].mean(2)
        for name, part in (("before", shares[:cut]), ("after", shares[cut:])):
            row |= {f"{topic}_topic_{name}": float(part[:, i].mean()) for i, topic in enumerate(("first", "second"))}
        rows.append(row)
    return rows


def to_data(results: Results, findings: Findings) -> dict[str, Any]:
    """Everything but the series, as plain data; what is no number is null."""
    data: dict[str, Any] = _plain(
        {
            "settings": results.settings.to_dict(),
            "arms_run": {arm.name: arm.pruner.to_dict() for arm in results.arms},
            "points": [point.name for point in results.points],
            "dimensions_of_overlap": results.top,
            "dtype": results.dtype,
            "texts": results.names,
            "backends": sorted({name for record in results.records.values() for name in record.backends}),
            "verdict": findings.verdict,
            "claims": findings.claims,
            "arms": findings.arms,
            "recovery": findings.recovery,
            "detector_curve": findings.curve,
            "neurons": findings.neurons,
            "text_quality": findings.quality,
            "escapes": findings.escapes,
            "statistics_bytes": max(record.held for record in results.records.values()),
            "notes": findings.notes,
        }
    )
    return data


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
