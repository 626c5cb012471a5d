"""What the runs of an evaluation did, added up: an evaluation attaches many times, and a report tells of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dartprune.report import Report

_COUNTS = ("contexts", "contexts_too_short", "contexts_cut", "dense_tokens", "pruned_tokens", "decode_forwards")


@dataclass
class Tally:
    """Counts of an evaluation.

    contexts: that were prefilled, each once.  contexts_too_short: of these, the ones no mask could be made for; they
    ran dense.  contexts_cut: of these, the ones that lost their beginning because they did not fit the model.
    dense_tokens, pruned_tokens: decoded ones, those of contexts that were too short included.  left_out: sum over
    decoded tokens of the share of the FFN's weights not used.  unread: sum over decode forwards of the share of the
    FFN's bytes not read.
    """

    contexts: int = 0
    contexts_too_short: int = 0
    contexts_cut: int = 0
    dense_tokens: int = 0
    pruned_tokens: int = 0
    decode_forwards: int = 0
    left_out: float = 0.0
    unread: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    backend: str = "none"

    @property
    def realised_sparsity(self) -> float:
        """One minus the share of the FFN's weights that the decoded tokens used, dense ones included."""
        tokens = self.dense_tokens + self.pruned_tokens
        return self.left_out / tokens if tokens else 0.0

    @property
    def bytes_saved(self) -> float:
        """Share of the FFN's weight bytes that was left unread in whole decode steps."""
        return self.unread / self.decode_forwards if self.decode_forwards else 0.0

    def add(self, report: Report, forwards: int) -> None:
        """Count a run that did `forwards` decode forwards."""
        run = Tally(
            dense_tokens=report.dense_tokens,
            pruned_tokens=report.pruned_tokens,
            decode_forwards=forwards,
            left_out=report.realised_sparsity * (report.dense_tokens + report.pruned_tokens),
            unread=report.bytes_saved * forwards,
            events=Counter(event.kind for event in report.events),
            notes=list(report.notes),
            backend=report.backend,
        )
        self.merge(run)

    def add_dense(self, tokens: int, forwards: int) -> None:
        """Count decoded tokens that the plain model computed."""
        self.dense_tokens += tokens
        self.decode_forwards += forwards

    def merge(self, other: Tally) -> None:
        """Count everything that another tally counted."""
        for name in (*_COUNTS, "left_out", "unread"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.events.update(other.events)
        self.backend = other.backend
        self.notes += [note for note in other.notes if note not in self.notes]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        """The tally that `to_dict` described."""
        named = {name: data[name] for name in (*_COUNTS, "backend")}
        tally = cls(**named, events=Counter(data["events"]), notes=list(data["notes"]))
        tally.unread = data["bytes_saved"] * tally.decode_forwards
        tally.left_out = data["realised_sparsity"] * (tally.dense_tokens + tally.pruned_tokens)
        return tally

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        shares = {"realised_sparsity": self.realised_sparsity, "bytes_saved": self.bytes_saved}
        counts = {name: getattr(self, name) for name in (*_COUNTS, "backend")}
        return {**shares, **counts, "events": dict(self.events), "notes": list(self.notes)}
