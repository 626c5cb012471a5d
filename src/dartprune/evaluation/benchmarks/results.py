"""Results of several arms: collected so that they survive a kill, and laid out as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dartprune.evaluation.tally import Tally
from dartprune.pruner import Pruner
from dartprune.reporting.journal import Journal


@dataclass(frozen=True)
class Table:
    """Cells as they are shown: a name in front of each row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Outcome:
    """What one arm gave. scores, errors: by name, with standard errors.  details: of each unit of work."""

    name: str
    pruner: Pruner
    scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "arm": self.name,
            "pruner": self.pruner.to_dict(),
            "scores": self.scores,
            "errors": self.errors,
            **self.tally.to_dict(),
            "details": self.details,
        }


def collect(
    chosen: Mapping[str, Pruner],
    units: Sequence[str],
    work: Callable[[Pruner, str], dict[str, Any]],
    journal: Journal,
) -> list[Outcome]:
    """Do every unit of work with every arm, or find it done in the journal.

    Args:
        chosen: the arms by name.
        units: names of the pieces of work.
        work: gives `scores`, `errors`, `did` (of a tally) and `details` as plain data.
        journal: of what is done.
    """
    outcomes = {name: Outcome(name, pruner) for name, pruner in chosen.items()}
    for unit in units:  # arm by arm within a unit: what is compared is done at about the same time
        for name, pruner in chosen.items():
            key = f"{unit} | {name}"
            if key not in journal:
                journal.add(key, work(pruner, unit))
            done, outcome = journal[key], outcomes[name]
            outcome.scores |= done["scores"]
            outcome.errors |= done["errors"]
            outcome.details[unit] = done["details"]
            outcome.tally.merge(Tally.from_dict(done["did"]))
    return list(outcomes.values())


def tables(outcomes: Sequence[Outcome], *, decimals: int = 3, mean: bool = False) -> list[Table]:
    """One table for each sparsity, beside the arms that do not prune.

    Args:
        outcomes: of the arms.
        decimals: of the scores.
        mean: add the mean of the scores, where these are of one kind.
    """
    plain = [outcome for outcome in outcomes if not outcome.pruner.prunes]
    sparsities = sorted({outcome.pruner.sparsity for outcome in outcomes if outcome.pruner.prunes})
    out = []
    for sparsity in sparsities or [0.0]:
        shown = plain + [o for o in outcomes if o.pruner.prunes and o.pruner.sparsity == sparsity]
        title = f"target sparsity {sparsity:g}" if sparsities else "not pruned"
        out.append(Table(title, ["", *(outcome.name for outcome in shown)], _rows(shown, decimals, mean)))
    return out


def _rows(shown: Sequence[Outcome], decimals: int, mean: bool) -> list[list[str]]:
    names = list(dict.fromkeys(name for outcome in shown for name in outcome.scores))
    rows = [[name, *(_score(outcome, name, decimals) for outcome in shown)] for name in names]
    if mean and len(names) > 1 and all(set(names) == set(outcome.scores) for outcome in shown):
        means = [sum(outcome.scores.values()) / len(names) for outcome in shown]
        rows.append(["mean", *(f"{value:.{decimals}f}" for value in means)])
    said: list[tuple[str, Callable[[Tally], str]]] = [
        ("realised sparsity", lambda t: f"{t.realised_sparsity:.3f}"),
        ("FFN bytes saved", lambda t: f"{t.bytes_saved:.3f}"),
        ("decoded pruned + dense", lambda t: f"{t.pruned_tokens} + {t.dense_tokens}"),
        ("events", lambda t: ", ".join(f"{n} {kind}" for kind, n in t.events.items()) or "none"),
        ("contexts too short", lambda t: f"{t.contexts_too_short} of {t.contexts}"),
    ]
    return rows + [[name, *(tell(outcome.tally) for outcome in shown)] for name, tell in said]


def _score(outcome: Outcome, name: str, decimals: int) -> str:
    if name not in outcome.scores:
        return ""
    error = outcome.errors.get(name)
    return f"{outcome.scores[name]:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
