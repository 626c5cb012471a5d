"""What happened while a model was attached: as data, as a dict, as a readable table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Event:
    """One change of a sequence's masks.

    kind: replay, settle, relearn, release.  sequence: number in the report.  position: tokens of the text before it.
    decoded: decode forwards before it.  similarity, threshold: of the detector's window, None for a clock.
    changed: neurons kept now that were not kept before, all layers together; None where masks were dropped.
    """

    kind: str
    sequence: int
    position: int
    decoded: int
    similarity: float | None = None
    threshold: float | None = None
    changed: int | None = None


@dataclass
class SequenceReport:
    """One sequence: token counts, realised sparsity, events, kept neurons per layer, similarities over its windows.

    candidates: with a token selector, the neurons of each layer among which each token finds its `keep`.
    dense_because: dense tokens by what kept them dense: `short` (prompt), `start`, `relearn`, `released`, `paused`.
    """

    sequence: int
    prompt_tokens: int
    traced_tokens: int
    dense_tokens: int
    pruned_tokens: int
    realised_sparsity: float
    events: list[Event]
    keep: list[int] | None
    similarities: list[tuple[int, float, float]]
    notes: list[str] = field(default_factory=list)
    candidates: list[int] | None = None
    dense_because: dict[str, int] = field(default_factory=dict)


@dataclass
class LayerReport:
    """One layer: neurons it has, and the mean number kept over the sequences that had a mask (None: none had).

    candidates: with a token selector, among how many each token finds those it keeps.
    """

    index: int
    neurons: int
    kept: float | None
    candidates: float | None = None

    @property
    def pruned_fraction(self) -> float | None:
        """Share of the layer's neurons left out."""
        return None if self.kept is None else 1 - self.kept / self.neurons


@dataclass
class Report:
    """What a run did.

    realised_sparsity: one minus the share of the FFN's weights that the decoded tokens used, dense ones included, the
        same on every backend.  bytes_saved: what the backend really left unread of the FFN's weights in whole decode
        steps, replays included.  overhead_bytes: held for the model and all live sequences.
    overhead_bytes_per_sequence: for one sequence.  overhead_bytes_per_model: for the model (a token selector's sketch).
    ceiling: everything was computed to find what could have been left out.
    seconds: host time of attaching, of compiling kernels before it (kept on disk), of decode forwards, of tracing,
        detecting and refreshing, and of detaching.
    refresh_flops: arithmetic of all replays.
    tokens_per_second: decoded tokens of all sequences for each second inside decode forwards, on the host's clock,
        without what lies between them (sampling, `generate()` itself); None where that was not timed: a device that is
        not waited for, or compiled forwards.
    step: what computes the rest of a decode step, beside the FFN.
    reasons: why a figure is under what was asked, by the figure's name in the table.
    """

    method: str
    backend: str
    ceiling: bool
    saves_time: bool
    target_sparsity: float
    realised_sparsity: float
    bytes_saved: float
    dense_tokens: int
    pruned_tokens: int
    prompt_tokens: int
    sequences: list[SequenceReport]
    layers: list[LayerReport]
    overhead_bytes: int
    overhead_bytes_per_sequence: int
    overhead_bytes_per_model: int
    seconds: dict[str, float]
    refresh_flops: int
    tokens_per_second: float | None
    step: str
    reasons: dict[str, list[str]]
    notes: list[str]

    @property
    def events(self) -> list[Event]:
        """All events of all sequences, in the order of sequences."""
        return [event for sequence in self.sequences for event in sequence.events]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data["events"] = [asdict(event) for event in self.events]
        for layer, plain in zip(self.layers, data["layers"], strict=True):
            plain["pruned_fraction"] = layer.pruned_fraction
        return data

    def __str__(self) -> str:
        rows = [
            ("method", self.method + (" (ceiling: computes everything)" if self.ceiling else "")),
            ("backend", self.backend + ("" if self.saves_time else " (saves no time)")),
            ("target sparsity", f"{self.target_sparsity:.3f}"),
            ("realised sparsity", f"{self.realised_sparsity:.3f}"),
            ("FFN bytes saved", f"{self.bytes_saved:.3f}"),
            ("decoded tokens", f"{self.pruned_tokens} pruned, {self.dense_tokens} dense"),
            ("prompt tokens", f"{self.prompt_tokens} (always dense)"),
            ("sequences", str(len(self.sequences))),
            ("events", _counted([event.kind for event in self.events])),
            ("layers keep", _spread([layer.kept for layer in self.layers], [n.neurons for n in self.layers])),
            ("extra memory", _held(self.overhead_bytes_per_sequence, self.overhead_bytes_per_model)),
            ("decoding", _rate(self.tokens_per_second)),
            ("rest of a step", self.step),
            ("seconds", ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())),
        ]
        rows = [
            row
            for name, value in rows
            for row in ((name, value), *(("because", t) for t in self.reasons.get(name, [])))
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _held(sequence: int, model: int) -> str:
    text = f"{sequence / 1e6:.2f} MB per sequence"
    return text + (f", {model / 1e6:.2f} MB for the model" if model else "")


def _rate(tokens_per_second: float | None) -> str:
    return "not timed" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s in decode forwards"


def _counted(kinds: Sequence[str]) -> str:
    if not kinds:
        return "none"
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _spread(kept: Sequence[float | None], neurons: Sequence[int]) -> str:
    shares = [k / n for k, n in zip(kept, neurons, strict=True) if k is not None]
    if not shares:
        return "all neurons (no mask was made)"
    return f"{min(shares):.0%} to {max(shares):.0%} of their neurons"
