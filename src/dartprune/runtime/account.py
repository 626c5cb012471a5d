"""Counts what a run did, and writes the report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.report import LayerReport, Report, SequenceReport
from dartprune.runtime.build import LiveParts
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.slots import Slot, State
from dartprune.selectors.settings import TokenSelector


@dataclass
class Ended:
    """A sequence that is over, with its counters as they were; they stay on the device until the report."""

    slot: Slot
    dense: Tensor
    pruned: Tensor
    saved: Tensor


class Account:
    """Bytes read, seconds spent, sequences ended."""

    def __init__(self, method: Method, parts: LiveParts) -> None:
        self.method = method
        self.parts = parts
        self.seconds = {
            "attaching": 0.0,
            "tracing": 0.0,
            "detecting": 0.0,
            "refreshing": 0.0,
            "detaching": 0.0,
        }
        self.notes = list(parts.notes)
        self.refresh_flops = self.replays = 0
        self.saving = saving_per_token(parts.layers, method.sparsity, method.token) if method.prunes else None
        self._read = 0.0
        self._whole = 0.0
        self._steps = {True: 0, False: 0}  # wholly pruned ones: by rows, and dense with masks since that was faster
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
        if pruned and chosen and self._gathers and all(slot.state is State.PRUNED for slot in slots):
            self._steps[gathered] += 1
        if not gathered:
            self._read += whole
            return
        key = (masks, tuple(slot.id for slot in slots))
        if self._known is None or self._known[0] != key:
            self._known = (key, self._step_bytes(slots))
        self._read += self._known[1]

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

    def _chosen(self) -> list[str]:
        """What is said of steps that ran dense with masks although rows could have been read."""
        dense = self._steps[False]
        if not dense:
            return []
        return [f"{dense} of {sum(self._steps.values())} pruned steps ran dense with masks: faster for so many neurons"]

    def close(self, slot: Slot) -> None:
        """Keep what a sequence did, before its slot is used again."""
        counters = self.parts.counters
        # the report needs counts and events; the detector's vectors would pile up where many sequences end
        slot.detection.drift, slot.detection.recent = self.method.detector.build(), []
        self._ended.append(
            Ended(slot, *(t[slot.id].clone() for t in (counters.dense, counters.pruned, counters.saved)))
        )

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _pays_after(self) -> int | None:
        if self.saving is None or self.saving <= 0:
            return None
        return math.ceil((self.seconds["attaching"] + self.seconds["detaching"]) / self.saving)

    def report(self, live: Sequence[Slot]) -> Report:
        """What happened so far."""
        counters = self.parts.counters
        rows = [*self._ended]
        rows += [
            Ended(slot, counters.dense[slot.id], counters.pruned[slot.id], counters.saved[slot.id]) for slot in live
        ]
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
            pays_after_tokens=self._pays_after(),
            notes=self.notes + self._chosen() + list(dict.fromkeys(note for row in rows for note in row.slot.notes)),
        )


def _lists(number: int, layer: LiveLayer, slots: Sequence[Slot]) -> list[Tensor]:
    """The neurons that the masks of these pruned sequences keep in a layer, int32 [k] each."""
    counts = [slot.masks.keep[number] for slot in slots if slot.masks.keep is not None]
    return [layer.selection.kept(slot.id, count) for slot, count in zip(slots, counts, strict=True)]


@torch.no_grad()
def saving_per_token(
    layers: Sequence[LiveLayer], sparsity: float, selector: TokenSelector | None = None
) -> float | None:
    """Seconds that one sequence's token is spared, measured in the middle layer; None where no time is saved.

    Dense and pruned alternate, the medians count. The layer's own weights are used, with evenly spread neurons.
    """
    middle = layers[len(layers) // 2]
    weights = middle.weights
    if not middle.saves_time or isinstance(weights, str):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, weights.hidden, generator=generator, dtype=torch.float32, device="cpu").to(weights.up)
    k = wanted = max(1, round((1 - sparsity) * weights.neurons))
    if selector is not None:
        rows = (1 - sparsity - middle.fixed_share) * weights.neurons
        k, wanted = selector.split(rows, weights.neurons, gated=middle.parts.gated)
    index = torch.linspace(0, weights.neurons - 1, k, dtype=torch.float64, device=x.device).to(torch.int32)[None]
    count = torch.full((1,), k, dtype=torch.int32, device=x.device)
    each = torch.full((1,), wanted, dtype=torch.int32, device=x.device)
    slots = torch.zeros(1, dtype=torch.int64, device=x.device)
    dense: list[float] = []
    pruned: list[float] = []
    for _ in range(5):
        began = _now(x.device)
        middle.parts.projected(middle.parts.activations(x))
        between = _now(x.device)
        if middle.selector is None:
            middle.backend.ffn(x, weights, index, count, slots)
        else:
            middle.selector.compute(x, weights, index, count, slots, each)
        pruned.append(_now(x.device) - between)
        dense.append(between - began)
    return (statistics.median(dense) - statistics.median(pruned)) * len(layers)


def _now(device: torch.device) -> float:
    """Seconds, when what was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
