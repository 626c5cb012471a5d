"""Counts what a run did, and writes the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.report import LayerReport, Report, SequenceReport
from dartprune.runtime.build import LiveParts
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.reasons import CAUSES, StepCounts, for_bytes, for_sparsity
from dartprune.runtime.slots import Slot, State


@dataclass
class Ended:
    """A sequence that is over, with its counters as they were; they stay on the device until the report."""

    slot: Slot
    dense: Tensor
    pruned: Tensor
    saved: Tensor
    causes: Tensor


class Account:
    """Bytes read, seconds spent, sequences ended."""

    def __init__(self, method: Method, parts: LiveParts) -> None:
        self.method = method
        self.parts = parts
        self.seconds = {
            "attaching": 0.0,
            "compiling": 0.0,
            "decoding": 0.0,
            "tracing": 0.0,
            "detecting": 0.0,
            "refreshing": 0.0,
            "detaching": 0.0,
        }
        self.notes = list(parts.notes)
        self.refresh_flops = self.replays = 0
        self.steps = StepCounts()
        self.step: Callable[[int], str] = lambda steps: ""  # what computed the rest of so many decode steps
        self._read = 0.0
        self._whole = 0.0
        self._ended: list[Ended] = []
        self._known: tuple[tuple[int, tuple[int, ...]], int] | None = None
        self._gathers = all(layer.backend.gathers for layer in parts.layers)
        self._layer_bytes = [layer.parts.weight_bytes for layer in parts.layers]

    def decoded(self, slots: Sequence[Slot], masks: int, *, pruned: bool, gathered: bool, chosen: bool = True) -> None:
        """A decode forward of these sequences reads its FFN weights.

        Args:
            slots: the sequences.
            masks: changes whenever a mask does.
            pruned: whether masks are in force.
            gathered: whether rows were read; else the whole FFN was.
            chosen: whether that was decided by what is faster.
        """
        whole = float(sum(self._layer_bytes))
        self._whole += whole
        self._count_step([slot.state is State.PRUNED for slot in slots], pruned, gathered, chosen)
        if not gathered:
            self._read += whole
            return
        key = (masks, tuple(slot.id for slot in slots))
        if self._known is None or self._known[0] != key:
            self._known = (key, self._step_bytes(slots))
        self._read += self._known[1]

    def _count_step(self, masked: Sequence[bool], pruned: bool, gathered: bool, chosen: bool) -> None:
        steps = self.steps
        steps.all += 1
        if gathered:
            steps.by_rows += 1
            steps.most_lines = max(steps.most_lines, len(masked))
        elif pruned and self._gathers and any(masked):
            if not all(masked):
                steps.mixed += 1
            elif chosen:
                steps.faster_dense += 1

    def timed(self, seconds: float) -> None:
        """A decode forward took so long on the host."""
        self.steps.timed += 1
        self.steps.seconds += seconds

    def _step_bytes(self, slots: Sequence[Slot]) -> int:
        """Weight bytes that a pruned step of these sequences reads; the same until a mask changes."""
        total = 0
        for number, (layer, size) in enumerate(zip(self.parts.layers, self._layer_bytes, strict=True)):
            if layer.selector is not None:
                total += layer.selector.fixed_bytes(self._candidates(number, layer, slots), len(slots))
            elif layer.backend.gathers and not isinstance(layer.weights, str):
                total += layer.backend.bytes_read(layer.weights, _lists(number, layer, slots))
            else:
                total += size
        return total

    def _candidates(self, number: int, layer: LiveLayer, slots: Sequence[Slot]) -> int:
        """Candidates that are read for these sequences: their union, or each sequence's own."""
        assert layer.selector is not None
        lists = _lists(number, layer, slots)
        if not layer.selector.reads_union:
            return sum(len(neurons) for neurons in lists)
        if len(slots) == 1 or layer.selection.everything:
            return len(lists[0])
        return int(torch.cat(lists).unique().numel())

    def _bytes_saved(self) -> float:
        """Share of the FFN's weight bytes that was left unread; every replay reads gate and up of all layers."""
        if not self._whole or not self._gathers:
            return 0.0
        once = sum(
            size * (2 / 3 if layer.parts.gated else 1 / 2)
            for layer, size in zip(self.parts.layers, self._layer_bytes, strict=True)
        )
        chosen = self.parts.spending.bytes_read if self.parts.spending is not None else 0.0
        return 1 - (self._read + chosen + self.replays * once) / self._whole

    def close(self, slot: Slot) -> None:
        """Keep what a sequence did, before its slot is used again."""
        # the report needs counts and events; the detector's vectors would pile up where many sequences end
        slot.detection.drift, slot.detection.recent = self.method.detector.build(), []
        row = self._row(slot)
        self._ended.append(Ended(slot, row.dense.clone(), row.pruned.clone(), row.saved.clone(), row.causes.clone()))

    def sequence(self, slot: Slot) -> SequenceReport:
        """What one sequence did so far (waits for the device)."""
        return _sequence(self._row(slot))

    def take(self, slots: Sequence[Slot]) -> list[SequenceReport]:
        """What these closed sequences did; the report tells no more of them."""
        rows = {id(row.slot): row for row in self._ended}
        taken = [rows[id(slot)] for slot in slots]
        self._ended = [row for row in self._ended if not any(row is other for other in taken)]
        return [_sequence(row) for row in taken]

    def _row(self, slot: Slot) -> Ended:
        counters = self.parts.counters
        counts = (t[slot.id] for t in (counters.dense, counters.pruned, counters.saved, counters.causes))
        return Ended(slot, *counts)

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _rate(self, tokens: int) -> float | None:
        """Tokens of all sequences for each second inside decode forwards; None where not all of them were timed."""
        steps = self.steps
        on_host = all(layer.place[0].type == "cpu" for layer in self.parts.layers)
        if not on_host or steps.timed < steps.all or not steps.seconds:
            return None
        return tokens / steps.seconds

    def _reasons(self, sequences: Sequence[SequenceReport], saved: float) -> dict[str, list[str]]:
        """Why less was left out than asked, and why fewer bytes were saved than that."""
        dense, pruned = sum(s.dense_tokens for s in sequences), sum(s.pruned_tokens for s in sequences)
        realised = saved / (dense + pruned) if dense + pruned else 0.0
        causes = {name: sum(s.dense_because.get(name, 0) for s in sequences) for name in CAUSES}
        share = saved / pruned if pruned else 0.0
        reasons = {"realised sparsity": for_sparsity(self.method, realised, pruned, dense, share, causes)}
        if not self._gathers and self.method.prunes and self.steps.all:
            layers, masked = len(self.parts.layers), sum(not layer.backend.gathers for layer in self.parts.layers)
            some = f"{masked} of {layers} layers cannot be read by rows: " if masked < layers else ""
            reasons["FFN bytes saved"] = [f"{some}every layer computes all neurons and zeroes the rest"]
        if self._gathers and self.steps.all:
            reasons["FFN bytes saved"] = for_bytes(realised, self._bytes_saved(), self.steps, self.replays)
        return {figure: lines for figure, lines in reasons.items() if lines}

    def report(self, live: Sequence[Slot]) -> Report:
        """What happened so far."""
        counters = self.parts.counters
        rows = [*self._ended, *map(self._row, live)]
        rows.sort(key=lambda row: row.slot.sequence)
        sequences = [_sequence(row) for row in rows]
        dense = sum(s.dense_tokens for s in sequences)
        pruned = sum(s.pruned_tokens for s in sequences)
        saved = sum(s.realised_sparsity * (s.dense_tokens + s.pruned_tokens) for s in sequences)
        shared = self.parts.spending.held if self.parts.spending is not None else 0
        held = sum(holder.bytes_per_slot() for holder in self.parts.holders)
        held += self.method.detector.build().bytes_held(hidden=self.parts.windows.vectors.shape[-1])
        backends = list(dict.fromkeys(layer.backend.name for layer in self.parts.layers))
        return Report(
            method=self.method.name,
            backend="+".join(backends) if self.method.prunes else "none",
            ceiling=self.method.token is not None and self.method.token.ceiling,
            saves_time=self.method.prunes and all(layer.saves_time for layer in self.parts.layers),
            target_sparsity=float(self.method.sparsity),
            realised_sparsity=saved / (dense + pruned) if dense + pruned else 0.0,
            bytes_saved=self._bytes_saved(),
            dense_tokens=dense,
            pruned_tokens=pruned,
            prompt_tokens=sum(s.prompt_tokens for s in sequences),
            sequences=sequences,
            layers=_layers(self.parts.layers, sequences),
            overhead_bytes=held * max(1, counters.dense.shape[0]) + shared if self.method.prunes else 0,
            overhead_bytes_per_sequence=held if self.method.prunes else 0,
            overhead_bytes_per_model=shared,
            seconds=dict(self.seconds),
            refresh_flops=self.refresh_flops,
            tokens_per_second=self._rate(dense + pruned),
            step=self.step(self.steps.all),
            reasons=self._reasons(sequences, saved),
            notes=self.notes + list(dict.fromkeys(note for row in rows for note in row.slot.notes)),
        )


def _lists(number: int, layer: LiveLayer, slots: Sequence[Slot]) -> list[Tensor]:
    """The neurons that the masks of these pruned sequences keep in a layer, int32 [k] each."""
    counts = [slot.masks.keep[number] for slot in slots if slot.masks.keep is not None]
    return [layer.selection.kept(slot.id, count) for slot, count in zip(slots, counts, strict=True)]


def _sequence(row: Ended) -> SequenceReport:
    slot, dense, pruned = row.slot, int(row.dense), int(row.pruned)
    real = slot.inherited + dense + pruned  # a finished line of a batch goes on as padding
    keep, per_token = (slot.masks.keep, slot.masks.per_token) if slot.masked_within(real) else (None, None)
    events = [replace(logged.told(), sequence=slot.sequence) for logged in slot.events_within(real)]
    return SequenceReport(
        sequence=slot.sequence,
        prompt_tokens=slot.prompt_tokens,
        traced_tokens=slot.traced_within(real),
        dense_tokens=dense,
        pruned_tokens=pruned,
        realised_sparsity=float(row.saved) / (dense + pruned) if dense + pruned else 0.0,
        events=events,
        keep=_copy(keep if per_token is None else per_token),
        similarities=[item for item in slot.detection.similarities if item[0] <= real],
        notes=list(slot.notes),
        dense_because={name: count for name, count in zip(CAUSES, row.causes.tolist(), strict=False) if count},
        candidates=_copy(None if per_token is None else keep),
    )


def _layers(layers: Sequence[LiveLayer], sequences: Sequence[SequenceReport]) -> list[LayerReport]:
    keeps = [s.keep for s in sequences if s.keep is not None]
    candidates = [s.candidates for s in sequences if s.candidates is not None]
    return [
        LayerReport(layer.index, layer.neurons, _mean(keeps, number), _mean(candidates, number))
        for number, layer in enumerate(layers)
    ]


def _copy(counts: list[int] | None) -> list[int] | None:
    return None if counts is None else list(counts)


def _mean(counts: list[list[int]], number: int) -> float | None:
    return sum(count[number] for count in counts) / len(counts) if counts else None
