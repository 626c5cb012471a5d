"""Results of several arms: collected so that they survive a kill, and laid out as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dartprune.evaluation.stats import Interval, interval
from dartprune.evaluation.tally import Tally
from dartprune.pruner import Pruner
from dartprune.reporting.journal import Journal
from dartprune.reporting.page import Sheet


@dataclass
class ArmScores:
    """What one arm gave. scores, errors: by name, with standard errors.  details: of each unit of work.

    each: by name, what the score is the mean of, document by document; only of such scores.
    """

    name: str
    pruner: Pruner
    scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    each: dict[str, list[float]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of all scores, where these are of one kind."""
        return sum(self.scores.values()) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        own = {"arm": self.name, "pruner": self.pruner.to_dict(), "scores": self.scores, "errors": self.errors}
        return {**own, **self.tally.to_dict(), "details": self.details}


def collect(
    arms: Mapping[str, Pruner],
    units: Sequence[str],
    work: Callable[[Pruner, str], dict[str, Any]],
    journal: Journal,
) -> list[ArmScores]:
    """Do every unit of work with every arm, or find it done in the journal.

    Args:
        arms: pruners by name.
        units: names of the pieces of work.
        work: gives `scores`, `errors`, `did` (of a tally) and `details` as plain data, and `each` where it can.
        journal: of what is done.
    """
    collected = {name: ArmScores(name, pruner) for name, pruner in arms.items()}
    for unit in units:  # arm by arm within a unit: what is compared is done at about the same time
        for name, pruner in arms.items():
            key = f"{unit} | {name}"
            if key not in journal:
                journal.add(key, work(pruner, unit))
            done, arm = journal[key], collected[name]
            arm.scores |= done["scores"]
            arm.errors |= done["errors"]
            arm.each |= done.get("each", {})
            arm.details[unit] = done["details"]
            arm.tally.merge(Tally.from_dict(done["did"]))
    return list(collected.values())


def differences(arms: Sequence[ArmScores]) -> dict[str, dict[str, Interval]]:
    """What each arm that prunes scores more than the first that does not, by arm and score, paired over documents."""
    plain = next((arm for arm in arms if not arm.pruner.prunes), None)
    if plain is None:
        return {}
    pruning = [arm for arm in arms if arm.pruner.prunes]
    return {
        arm.name: {
            name: interval(np.array(values) - plain.each[name])
            for name, values in arm.each.items()
            if len(plain.each.get(name, [])) == len(values)
        }
        for arm in pruning
    }


_DID: dict[str, Callable[[Tally], str]] = {
    "realised sparsity": lambda t: f"{t.realised_sparsity:.3f}",
    "FFN bytes saved": lambda t: f"{t.bytes_saved:.3f}",
    "decoded pruned + dense": lambda t: f"{t.pruned_tokens} + {t.dense_tokens}",
    "events": lambda t: ", ".join(f"{n} {kind}" for kind, n in t.events.items()) or "none",
    "contexts too short": lambda t: f"{t.contexts_too_short} of {t.contexts}",
}


def tables(arms: Sequence[ArmScores], *, decimals: int = 3, mean: bool = False) -> list[Sheet]:
    """One table for each sparsity, beside the arms that do not prune; with `mean` a line for the mean of the scores."""
    plain = [arm for arm in arms if not arm.pruner.prunes]
    sparsities = sorted({arm.pruner.sparsity for arm in arms if arm.pruner.prunes})
    out = []
    for sparsity in sparsities or [0.0]:
        shown = plain + [arm for arm in arms if arm.pruner.prunes and arm.pruner.sparsity == sparsity]
        title = f"target sparsity {sparsity:g}" if sparsities else "not pruned"
        out.append(Sheet(title, ["", *(arm.name for arm in shown)], _rows(shown, decimals, mean)))
    return [*out, *_paired(arms, decimals)]


def _paired(arms: Sequence[ArmScores], decimals: int) -> list[Sheet]:
    found = {name: scores for name, scores in differences(arms).items() if scores}
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))

    def told(scores: Mapping[str, Interval], name: str) -> str:
        if name not in scores:
            return ""
        value, low, high = (f"{x:+.{decimals}f}" for x in vars(scores[name]).values())
        return f"{value} [{low}, {high}]"

    rows = [[name, *(told(scores, name) for scores in found.values())] for name in names]
    title = "difference to dense on the same documents, with 95 % intervals"
    return [Sheet(title, ["", *found], rows)] if rows else []


def _rows(shown: Sequence[ArmScores], decimals: int, mean: bool) -> list[list[str]]:
    names = list(dict.fromkeys(name for arm in shown for name in arm.scores))
    rows = [[name, *(_score(arm, name, decimals) for arm in shown)] for name in names]
    if mean and len(names) > 1 and all(set(names) == set(arm.scores) for arm in shown):
        rows.append(["mean", *(f"{arm.mean:.{decimals}f}" for arm in shown)])
    return rows + [[name, *(tell(arm.tally) for arm in shown)] for name, tell in _DID.items()]


def _score(arm: ArmScores, name: str, decimals: int) -> str:
    if name not in arm.scores:
        return ""
    error = arm.errors.get(name)
    return f"{arm.scores[name]:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
