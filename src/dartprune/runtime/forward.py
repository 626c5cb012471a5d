"""One forward after another: planned before the layers run, and its consequences drawn once its tokens are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.model.rows import Phase, Rows
from dartprune.runtime.events import Events
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.prompt import prefilled
from dartprune.runtime.rows_or_dense import RowsOrDense
from dartprune.runtime.sample import Sample, sample
from dartprune.runtime.selectors.spending import Spending
from dartprune.runtime.slots import Slot, State
from dartprune.runtime.step import Planner
from dartprune.runtime.tokens import Tokens


@dataclass
class Candidates:
    """Tokens that wait for the cache to tell how many of them stay; `length`: of the cache without them."""

    rows: Rows
    slots: list[Slot]
    attention: Tensor | None
    cache: Any
    length: int
    spent: Tensor | None  # by each candidate's own neurons


class Forwards:
    """Tells the layers what the coming forward is, and the rest of the run what it was."""

    def __init__(
        self,
        method: Method,
        layers: Sequence[LiveLayer],
        tokens: Tokens,
        events: Events,
        spending: Spending | None = None,
    ) -> None:
        self.method = method
        self.layers = list(layers)
        self.candidates: Candidates | None = None
        self.rows_or_dense = RowsOrDense(layers)
        self.gathered = False  # whether the forward that began last reads rows
        self.heard: str | None = None  # what reading rows would leave out by now
        self._tokens = tokens
        self._events = events
        self._spending = spending
        self._rings = list(dict.fromkeys(layer.ring.rings for layer in layers if layer.ring is not None))
        self._ring = method.refresh.replay_tokens
        states = {layer.trace.device: layer.state for layer in layers}
        self._learns = any(layer.selector is not None and layer.selector.learns for layer in layers)
        self._planner = Planner(states, self._ring, method.skip_first, learns=self._learns)
        self.rows: Rows | None = None  # of the forward under way
        self._slots: list[Slot] = []
        self._ended: Tensor | None = None
        self._traced: Tensor | None = None
        self._paused = False

    # ---- before the layers run

    def begin(self, rows: Rows, slots: list[Slot], ended: Tensor | None, *, paused: bool) -> None:
        """Tell the layers what the coming forward is."""
        self.rows, self._slots, self._ended, self._paused = rows, slots, ended, paused
        self.gathered, self._traced = False, None
        if paused or not self.method.prunes:
            self._planner.plain()
        elif rows.phase is Phase.PREFILL:
            self._tokens.forget_padding(slots)
            self._traced = self._planner.prefill(rows, slots)
        else:
            self._events.make_ready(slots)
            self.gathered = self._gathers(rows, slots)
            self._planner.decode(rows, slots, ended, gathering=self.gathered)

    def abort(self) -> None:
        """The forward failed: nothing of it counts."""
        self._planner.plain()
        self._planner.forget()
        self.rows = None
        for layer in self.layers:
            layer.sampled = layer.lesson = None
        for rings in self._rings:
            rings.forget()
        if self._spending is not None:
            self._spending.forget()

    def _gathers(self, rows: Rows, slots: list[Slot]) -> bool:
        # where some lines are dense all weights are read anyway: masks cost nothing more
        if not all(slot.state is State.PRUNED for slot in slots):
            return False
        if self.heard is not None or not all(layer.backend.gathers for layer in self.layers):
            return False
        return rows.tokens > 1 or self.rows_or_dense.gathers(slots, self._events.masks.version)

    # ---- after the layers have run

    def finish(self, cache: Any, length: int) -> None:
        """Draw the consequences of the forward that began last.

        Args:
            cache: of its sequences.
            length: tokens it held before this forward.
        """
        rows, self.rows = self.rows, None
        if rows is None:
            return
        self._planner.plain()
        for rings in self._rings:
            rings.settle()
        attention = self.layers[-1].state.attention if self.method.prunes and not self._paused else None
        if attention is not None:
            attention = attention.reshape(len(rows.slots), rows.tokens, -1)
        spent = None
        if self._spending is not None:
            spent = self._spending.spent(len(rows.slots), rows.tokens, gathered=self.gathered)
        if self._planner.sample is not None and rows.phase is not Phase.VERIFY and not self._paused:
            self._teach(self._planner.sample, self._ended if rows.phase is Phase.DECODE else None)
        if rows.phase is Phase.PREFILL:
            prefilled(self._slots, rows, self._traced, attention, self._ring)
        elif rows.phase is Phase.DECODE:
            self._planner.advance()
            self._decoded(self._slots, rows.tokens, attention, self._ended, spent)
        else:
            self.candidates = Candidates(rows, self._slots, attention, cache, length, spent)

    def resolve(self, length: int | None) -> None:
        """Count the candidates that stayed; `length` is what the cache holds now, None if it is gone."""
        waiting, self.candidates = self.candidates, None
        if waiting is None or length is None:
            return
        stayed = min(waiting.rows.tokens, max(0, length - waiting.length))
        if not stayed:
            return
        if waiting.attention is not None:
            self._keep_staged(waiting, stayed)
        attention = waiting.attention[:, :stayed] if waiting.attention is not None else None
        spent = waiting.spent[:, :stayed] if waiting.spent is not None else None
        self._decoded(waiting.slots, stayed, attention, None, spent)

    def take_back(self, slots: Sequence[Slot], tokens: int) -> None:
        """The last tokens of these sequences were cropped away; what they taught the statistics stays."""
        for slot in slots:
            decoded = min(tokens, slot.decoded)
            pruned = min(decoded, slot.masks.age) if slot.state is State.PRUNED else 0
            self._tokens.uncount(slot, pruned, decoded - pruned)
            slot.position -= tokens
            slot.prompt_tokens -= tokens - decoded
            slot.decoded -= decoded
            slot.masks.age -= pruned
            slot.detection.fill = max(0, slot.detection.fill - decoded)
            slot.ring.retreat(tokens, self._ring)
            slot.finished = False

    def _teach(self, taught: Sample, ended: Tensor | None) -> None:
        """Let the selectors learn from what the layers have put aside; `ended` bool [B], lines that are over."""
        began = perf_counter()
        on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            x, layer.sampled = layer.sampled, None
            lesson, layer.lesson = layer.lesson, None
            if layer.selector is None or (x is None and lesson is None):
                continue
            device = layer.trace.device
            if device not in on:
                weight = taught.weight.to(device)
                if ended is not None:
                    weight = weight * (~ended.to(device)).float()[:, None]
                on[device] = taught.slots.to(device), weight
            slots, weight = on[device]
            if lesson is None:
                assert x is not None
                lesson = layer.selector.lesson(x.view(*taught.rows.shape, -1), weight, slots)
            layer.selector.learn(lesson, slots, weight)
        self.layers[-1].state.tracing_seconds += perf_counter() - began

    def _decoded(
        self, slots: list[Slot], tokens: int, attention: Tensor | None, ended: Tensor | None, spent: Tensor | None
    ) -> None:
        pruned = [slot.state is State.PRUNED and not self._paused for slot in slots]
        fired, settled = self._tokens.decoded(slots, pruned, tokens, attention, ended, spent)
        masked = [slot for slot, is_pruned in zip(slots, pruned, strict=True) if is_pruned]
        self._events.after_tokens(slots, masked, fired, settled, ended)

    def _keep_staged(self, waiting: Candidates, stayed: int) -> None:
        """Trace and buffer the candidates that stayed, from the inputs that the layers put aside."""
        slots = waiting.slots
        block = Rows(Phase.DECODE, waiting.rows.slots, stayed)
        ring = block.tail(self._ring, [slot.ring.next for slot in slots]) if self._ring else None
        learning = torch.tensor([slot.state is State.LEARNING for slot in slots], dtype=torch.float32, device="cpu")
        weight = learning[:, None].expand(-1, stayed)
        ids = torch.tensor(waiting.rows.slots, dtype=torch.int64, device="cpu")
        taught = sample(block, slots, weight) if self._learns else None
        for layer in self.layers:
            assert layer.staged is not None
            device = layer.trace.device
            x = layer.staged[:, :stayed]
            if ring is not None and layer.ring is not None:
                layer.ring.write(x.reshape(-1, x.shape[-1]), *(part.to(device) for part in ring))
            if bool(learning.any()):
                rows, counted = ids.to(device), weight.to(device)
                layer.trace.add(layer.parts.activations(x), rows, counted)
                if layer.staged_impact is not None:
                    layer.trace.add_impact(layer.staged_impact[:, :stayed], rows, counted, counted)
            if taught is not None:
                layer.sampled = x.reshape(-1, x.shape[-1]).index_select(0, taught.rows.flatten().to(device))
            layer.staged = layer.staged_impact = None
        if taught is not None:
            self._teach(taught, None)
