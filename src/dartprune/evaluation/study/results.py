"""The finished units of a study, put together: one record for each arm and kind of text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.stats import Array, Interval, interval
from dartprune.evaluation.study.lockstep import Unit
from dartprune.evaluation.study.measures import WINDOW_MEASURES
from dartprune.evaluation.study.observe import Point
from dartprune.evaluation.study.settings import Settings

KINDS = ("change", "control")  # texts that change their topic, and texts that keep it
_TEXT_AXIS = {"windows": 3, "loss": 1, "dense_loss": 1, "text": 1, "judged": 2, "overlap": 3}


@dataclass
class Record:
    """One arm on all texts of one kind: the units' contents, joined along the texts; see `lockstep.Unit`."""

    arm: ArmAt
    kind: str
    tokens: Array
    windows: Array
    loss: Array
    dense_loss: Array
    text: Array
    judged: Array
    overlap: Array
    events: list[list[dict[str, Any]]]
    neurons: list[dict[str, Any]]
    similarities: list[list[tuple[int, float, float]]]
    realised: Array
    backends: list[str]
    held: int

    @property
    def texts(self) -> int:
        """How many texts."""
        return int(self.loss.shape[1])

    def measure(self, name: str, point: int) -> Array:
        """A window measure at a point: [windows, texts]."""
        return np.asarray(self.windows[:, point, WINDOW_MEASURES.index(name)])

    def alarms(self) -> list[list[int]]:
        """Decoded tokens of each text's events, without those that no detection caused (settles, timed releases)."""
        return [[e["decoded"] for e in events if e["similarity"] is not None] for events in self.events]


def save_unit(unit: Unit, path: Path) -> None:
    """Write a unit's arrays; a kill leaves either the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    np.savez_compressed(part, **unit.arrays)  # type: ignore[arg-type]
    os.replace(part, path)


def join(arm: ArmAt, kind: str, units: Sequence[tuple[dict[str, Array], dict[str, Any]]]) -> Record:
    """One record from the arrays and facts of its units."""
    arrays, facts = [a for a, _ in units], [f for _, f in units]
    sizes = np.array([a["loss"].shape[1] for a in arrays], dtype=np.float64)
    joined = {name: np.concatenate([a[name] for a in arrays], axis) for name, axis in _TEXT_AXIS.items()}
    neurons: list[dict[str, Any]] = []
    for first, fact in zip(np.cumsum([0, *sizes[:-1]]).astype(int).tolist(), facts, strict=True):
        neurons += [row | {"stream": row["stream"] + first} for row in fact["neurons"]]
    return Record(
        arm=arm,
        kind=kind,
        tokens=_pooled([a["tokens"] for a in arrays], sizes / sizes.sum()),
        events=[events for fact in facts for events in fact["events"]],
        neurons=neurons,
        similarities=[s for fact in facts for s in fact["similarities"]],
        realised=np.array([share for fact in facts for share in fact["realised_sparsity"]]),
        backends=sorted({fact["backend"] for fact in facts}),
        held=max(fact["held"] for fact in facts),
        **joined,
    )


def _pooled(parts: Sequence[Array], weights: Array) -> Array:
    """Mean and standard deviation [..., 2] over all texts from those of each batch."""
    mean = sum(w * part[..., 0] for w, part in zip(weights, parts, strict=True))
    square = sum(w * (part[..., 1] ** 2 + part[..., 0] ** 2) for w, part in zip(weights, parts, strict=True))
    return np.stack((mean, np.sqrt(np.maximum(square - mean**2, 0))), axis=-1)


@dataclass
class Results:
    """Everything a study has recorded."""

    settings: Settings
    points: list[Point]
    neurons: list[int]
    arms: list[ArmAt]
    top: int  # largest dimensions whose overlap is counted
    dtype: str  # of the model's weights
    names: dict[str, list[str]]
    records: dict[tuple[str, str], Record]

    def get(self, arm: str, kind: str = "change") -> Record | None:
        """The record of an arm, None if it was not run on texts of this kind."""
        return self.records.get((arm, kind))

    def pruning(self, kind: str = "change") -> list[Record]:
        """Records of the arms that prune, on texts of a kind."""
        return [r for r in self.records.values() if r.kind == kind and r.arm.pruner.prunes]

    def excess(self, record: Record) -> Array:
        """Loss over the dense model's, [steps, texts] in nats.

        Forced mode: the arm's loss minus the dense model's on the same token. Free mode: the dense model's loss on the
        text that the arm wrote, minus that on the text which the dense arm wrote. NaN at the steps of `Settings.join`,
        on one-topic texts too, so that both kinds are compared over the same steps.
        """
        if self.settings.mode == "forced":
            excess = np.asarray(record.loss - record.dense_loss)
        else:
            excess = np.asarray(record.dense_loss - self.records["dense", record.kind].dense_loss)
        excess[self.settings.join] = np.nan
        return excess

    def windowed_excess(self, record: Record) -> Array:
        """`excess` window by window, [windows, texts]: means of what is compared, NaN where nothing is."""
        s = self.settings
        parts = self.excess(record).reshape(s.windows, s.window, -1)
        compared = np.isfinite(parts)
        count = compared.sum(1)
        total = np.where(compared, parts, 0.0).sum(1)
        out: Array = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return out

    def interval(self, *groups: Array, statistic: Callable[[list[Array]], Array] | None = None) -> Interval:
        """Interval over texts with the study's draws; see `stats.interval`."""
        return interval(*groups, statistic=statistic, resamples=self.settings.resamples, seed=self.settings.seed)

    @property
    def releases(self) -> list[ArmAt]:
        """Arms whose masks are dropped at a decoded token, the earliest first."""
        return sorted((arm for arm in self.arms if arm.release is not None), key=lambda arm: arm.release or 0)

    @property
    def frozen(self) -> Record | None:
        """The arm whose prompt mask stays: `dart-frozen`, else the first arm of that kind."""
        return self._first("dart-frozen", [arm.name for arm in self.arms if arm.frozen])

    @property
    def steady(self) -> Record | None:
        """The frozen arm on texts that keep their topic."""
        return None if self.frozen is None else self.get(self.frozen.arm.name, "control")

    @property
    def detecting(self) -> Record | None:
        """The arm whose detector is shown: `dart`, else the first one that detects."""
        pruning = [arm for arm in self.arms if arm.pruner.prunes]
        return self._first("dart", [arm.name for arm in pruning if arm.pruner.refresh.detects])

    def _first(self, wanted: str, names: list[str]) -> Record | None:
        return self.get(wanted if wanted in names else names[0]) if names else None

    @property
    def lead(self) -> int:
        """Place of the point that stands for all: the last layer, in attention-output space if that is looked at."""
        last = max(point.layer for point in self.points)
        there = [i for i, point in enumerate(self.points) if point.layer == last]
        return next((i for i in there if self.points[i].space == "attention"), there[0])
