"""What a study has found: its numbers drawn together, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dartprune.evaluation.study import analysis
from dartprune.evaluation.study.analysis import ArmRow, Claim, Recovery
from dartprune.evaluation.study.detector import CurvePoint
from dartprune.evaluation.study.results import Results

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
