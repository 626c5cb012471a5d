"""What the runs of an evaluation did, added up: an evaluation attaches many times, and a report tells of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dartprune.report import Report


@dataclass
class Tally:
    """Counts of an evaluation.

    contexts: that were prefilled, each once.  contexts_too_short: of these, the ones no mask could be made for; they
    ran dense.  contexts_cut: of these, the ones that lost their beginning because they did not fit the model.
    dense_tokens, pruned_tokens: decoded ones, those of contexts that were too short included.
    """

    contexts: int = 0
    contexts_too_short: int = 0
    contexts_cut: int = 0
    dense_tokens: int = 0
    pruned_tokens: int = 0
    events: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    backend: str = "none"
    _left_out: float = 0.0  # sum over decoded tokens of the share of the FFN's weights not used
    _unread: float = 0.0  # sum over decode forwards of the share of the FFN's bytes not read
    _forwards: int = 0

    @property
    def realised_sparsity(self) -> float:
        """One minus the share of the FFN's weights that the decoded tokens used, dense ones included."""
        tokens = self.dense_tokens + self.pruned_tokens
        return self._left_out / tokens if tokens else 0.0

    @property
    def bytes_saved(self) -> float:
        """Share of the FFN's weight bytes that was left unread in whole decode steps."""
        return self._unread / self._forwards if self._forwards else 0.0

    def add(self, report: Report, forwards: int) -> None:
        """Count a run that did `forwards` decode forwards."""
        tokens = report.dense_tokens + report.pruned_tokens
        self.dense_tokens += report.dense_tokens
        self.pruned_tokens += report.pruned_tokens
        self._left_out += report.realised_sparsity * tokens
        self._unread += report.bytes_saved * forwards
        self._forwards += forwards
        self.events.update(event.kind for event in report.events)
        self.backend = report.backend
        self.notes += [note for note in report.notes if note not in self.notes]

    def add_dense(self, tokens: int, forwards: int) -> None:
        """Count decoded tokens that the plain model computed."""
        self.dense_tokens += tokens
        self._forwards += forwards

    def merge(self, other: Tally) -> None:
        """Count everything that another tally counted."""
        for name in (
            "contexts",
            "contexts_too_short",
            "contexts_cut",
            "dense_tokens",
            "pruned_tokens",
            "_left_out",
            "_unread",
            "_forwards",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.events.update(other.events)
        self.backend = other.backend
        self.notes += [note for note in other.notes if note not in self.notes]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        """The tally that `to_dict` described."""
        names = ("contexts", "contexts_too_short", "contexts_cut", "dense_tokens", "pruned_tokens", "backend")
        tally = cls(**{name: data[name] for name in names}, events=Counter(data["events"]), notes=list(data["notes"]))
        tally._forwards = data["decode_forwards"]
        tally._unread = data["bytes_saved"] * tally._forwards
        tally._left_out = data["realised_sparsity"] * (tally.dense_tokens + tally.pruned_tokens)
        return tally

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "realised_sparsity": self.realised_sparsity,
            "bytes_saved": self.bytes_saved,
            "contexts": self.contexts,
            "contexts_too_short": self.contexts_too_short,
            "contexts_cut": self.contexts_cut,
            "dense_tokens": self.dense_tokens,
            "pruned_tokens": self.pruned_tokens,
            "events": dict(self.events),
            "decode_forwards": self._forwards,
            "backend": self.backend,
            "notes": list(self.notes),
        }
