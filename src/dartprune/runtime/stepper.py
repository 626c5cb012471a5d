"""One forward after another: has it planned, and draws what follows once the tokens are known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.model.rows import Phase, Rows
from dartprune.refresh import Action
from dartprune.report import Event
from dartprune.runtime.device_values import Once
from dartprune.runtime.layer_hooks import LayerRun
from dartprune.runtime.masks import Renewal
from dartprune.runtime.rows_or_dense import Choice
from dartprune.runtime.selectors.tally import Tally
from dartprune.runtime.slots import Counters, Slot, State
from dartprune.runtime.step import Planner, Steps
from dartprune.runtime.windows import Watch


@dataclass
class Pending:
    """Candidates that wait for the cache to tell how many of them stay."""

    rows: Rows
    slots: list[Slot]
    attention: Tensor | None
    cache: Any
    length: int  # of the cache without the candidates
    spent: Tensor | None  # by each candidate's own neurons


class Stepper:
    """Has each forward planned and draws its consequences: counts, windows, events, new masks."""

    def __init__(
        self,
        method: Method,
        layers: Sequence[LayerRun],
        counters: Counters,
        watch: Watch,
        renewal: Renewal,
        announce: Callable[[Slot, Event, Tensor | None], None],
        tally: Tally | None = None,
    ) -> None:
        self.method = method
        self.layers = list(layers)
        self.states = {layer.trace.device: layer.state for layer in layers}
        self.counters = counters
        self.watch = watch
        self.renewal = renewal
        self.seconds = {"detecting": 0.0, "refreshing": 0.0}
        self.pending: Pending | None = None
        self.choice = Choice(layers)
        self.gathered = False  # whether the forward that began last reads rows
        self.heard: str | None = None  # what reading rows would leave out by now
        self._announce = announce
        self._tally = tally
        self._ring = method.refresh.replay_tokens
        self._planner = Planner(self.states, self._ring, method.skip_first)
        self._rows: Rows | None = None
        self._slots: list[Slot] = []
        self._ended: Tensor | None = None
        self._paused = False
        self._once = Once()

    # ---- before the layers run

    def begin(self, rows: Rows, slots: list[Slot], ended: Tensor | None, *, paused: bool) -> None:
        """Tell the layers what the coming forward is."""
        self._rows, self._slots, self._ended, self._paused = rows, slots, ended, paused
        self.gathered = False
        if paused or not self.method.prunes:
            self.clear()
            return
        steps = self._planner.prefill(rows, slots) if rows.phase is Phase.PREFILL else self._decode(rows, slots, ended)
        for device, state in self.states.items():
            state.step, state.attention = steps[device], None

    def clear(self) -> None:
        """Let the layers be plain again."""
        for state in self.states.values():
            state.step = None

    def abort(self) -> None:
        """The forward failed: nothing of it counts."""
        self.clear()
        self._rows = None
        self._planner.forget()

    def _decode(self, rows: Rows, slots: list[Slot], ended: Tensor | None) -> Steps:
        self._make_ready(slots)
        # where some lines are dense all weights are read anyway: masks cost nothing more
        self.gathered = all(slot.state is State.PRUNED for slot in slots)
        self.gathered = self.gathered and self.heard is None and all(layer.backend.gathers for layer in self.layers)
        if self.gathered and rows.tokens == 1:
            self.gathered = self.choice.gathers(slots, self.renewal.version)
        return self._planner.decode(rows, slots, ended, gathering=self.gathered)

    def _make_ready(self, slots: Sequence[Slot]) -> None:
        ready = [
            slot
            for slot in slots
            if (slot.state is State.PRUNED and slot.stale)
            or (
                slot.state is State.LEARNING
                and slot.dense_left == 0
                and slot.traced >= slot.least
                and slot.decoded >= self.method.start
            )
        ]
        if not ready:
            return
        began = time.perf_counter()
        for slot, changed in zip(ready, self.renewal.build(ready), strict=True):
            slot.state, slot.stale = State.PRUNED, False
            slot.since_mask = slot.window_fill = 0
            if slot.events and slot.events[-1][0].kind == Action.RELEARN.value and slot.events[-1][1] is None:
                slot.events[-1] = (slot.events[-1][0], changed)
        self.seconds["refreshing"] += time.perf_counter() - began

    # ---- after the layers have run

    def finish(self, cache: Any, length: int) -> None:
        """Draw the consequences of the forward that began last.

        Args:
            cache: of its sequences.
            length: tokens it held before this forward.
        """
        rows, self._rows = self._rows, None
        if rows is None:
            return
        self.clear()
        attention = self.layers[-1].state.attention if self.method.prunes and not self._paused else None
        if attention is not None:
            attention = attention.reshape(len(rows.slots), rows.tokens, -1)
        spent = self._tally.spent(len(rows.slots)) if self._tally is not None else None
        if rows.phase is Phase.PREFILL:
            self._prefilled(rows, attention)
        elif rows.phase is Phase.DECODE:
            self._planner.advance()
            self._after(self._slots, rows.tokens, attention, self._ended, spent)
        else:
            self.pending = Pending(rows, self._slots, attention, cache, length, spent)

    def _prefilled(self, rows: Rows, attention: Tensor | None) -> None:
        counted = self._planner.counted
        traced = counted.sum(1).tolist() if counted is not None and attention is not None else None
        for line, (slot, count) in enumerate(zip(self._slots, rows.counts(), strict=True)):
            slot.position += count
            slot.prompt_tokens += count
            slot.finished = False
            if traced is None or attention is None:
                continue
            slot.traced += int(traced[line])
            slot.stale = True
            self._into_ring(slot, count)
            columns = rows.line(line)
            vectors = attention[line]
            slot.drift.reference(vectors[columns if isinstance(columns, slice) else columns.to(vectors.device)])

    def _into_ring(self, slot: Slot, count: int) -> None:
        if self._ring:
            slot.ring_next = (slot.ring_next + count) % self._ring
            slot.ring_fill = min(self._ring, slot.ring_fill + count)

    def resolve(self, length: int | None) -> None:
        """Count the candidates that stayed; `length` is what the cache holds now, None if it is gone."""
        pending, self.pending = self.pending, None
        if pending is None or length is None:
            return
        stayed = min(pending.rows.tokens, max(0, length - pending.length))
        if not stayed:
            return
        if pending.attention is not None:
            self._keep_staged(pending, stayed)
        attention = pending.attention[:, :stayed] if pending.attention is not None else None
        spent = pending.spent[:, :stayed] if pending.spent is not None else None
        self._after(pending.slots, stayed, attention, None, spent)

    def _keep_staged(self, pending: Pending, stayed: int) -> None:
        slots = pending.slots
        block = Rows(Phase.DECODE, pending.rows.slots, stayed)
        ring = block.tail(self._ring, [slot.ring_next for slot in slots]) if self._ring else None
        learning = torch.tensor([slot.state is State.LEARNING for slot in slots], dtype=torch.float32, device="cpu")
        weight = learning[:, None].expand(-1, stayed)
        ids = torch.tensor(pending.rows.slots, dtype=torch.int64, device="cpu")
        for layer in self.layers:
            assert layer.staged is not None
            device = layer.trace.device
            x = layer.staged[:, :stayed]
            if ring is not None and layer.ring is not None:
                layer.ring.write(x.reshape(-1, x.shape[-1]), *(part.to(device) for part in ring))
            if bool(learning.any()):
                rows, counted = ids.to(device), weight.to(device)
                layer.trace.add(layer.layer.activations(x), rows, counted)
                if layer.staged_impact is not None:
                    layer.trace.add_impact(layer.staged_impact[:, :stayed], rows, counted, counted)
            layer.staged = layer.staged_impact = None

    def _after(
        self,
        slots: list[Slot],
        tokens: int,
        attention: Tensor | None,
        ended: Tensor | None,
        spent: Tensor | None,
    ) -> None:
        """Count `tokens` decoded tokens of each sequence and what they spent, feed the detectors, act."""
        device = self.counters.device
        ids = self._once([slot.id for slot in slots], device)
        pruned = [slot.state is State.PRUNED and not self._paused for slot in slots]
        alive = torch.ones(len(slots), dtype=torch.float32, device=device)
        if ended is not None:
            alive = (~ended).to(alive)
        mask = self._once(pruned, device)
        self.counters.pruned.index_add_(0, ids, (alive * mask * tokens).long())
        self.counters.dense.index_add_(0, ids, (alive * ~mask * tokens).long())
        left_out = tokens * self.counters.share.index_select(0, ids)
        if spent is not None:
            left_out = left_out - spent.sum(1)
        self.counters.saved.index_add_(0, ids, alive * mask * left_out)
        chosen = [slot for slot, is_pruned in zip(slots, pruned, strict=True) if is_pruned]
        began = time.perf_counter()
        fired, settled = self._watch(slots, pruned, ids, tokens, attention, ended)
        self.seconds["detecting"] += time.perf_counter() - began
        for slot, is_pruned in zip(slots, pruned, strict=True):
            slot.position += tokens
            if is_pruned:
                slot.since_mask += tokens
            elif slot.state is State.LEARNING and attention is not None:
                slot.traced += tokens
                slot.dense_left = max(0, slot.dense_left - tokens)
            if attention is not None:
                self._into_ring(slot, tokens)
        self._act(chosen, fired, settled, slots, ended)

    def _watch(
        self,
        slots: list[Slot],
        pruned: list[bool],
        ids: Tensor,
        tokens: int,
        attention: Tensor | None,
        ended: Tensor | None,
    ) -> tuple[set[int], set[int]]:
        fired: set[int] = set()
        settled: set[int] = set()
        watched = [line for line, is_pruned in enumerate(pruned) if is_pruned]
        detects = self.method.refresh.detects and attention is not None
        for t in range(tokens):
            for slot in slots:
                slot.decoded += 1
            if not detects or attention is None:
                continue
            for line, slot in enumerate(slots):
                if slot.state is State.LEARNING:
                    slot.drift.reference(attention[line, t : t + 1])
            if watched:
                every = len(watched) == len(slots)
                lines = self._once(watched, attention.device)
                new_fired, new_settled = self.watch.feed(
                    [slots[line] for line in watched],
                    ids.to(attention.device) if every else ids.to(attention.device)[lines],
                    attention[:, t] if every else attention[lines, t],
                    ended if every or ended is None else ended[lines.to(ended.device)],
                )
                fired |= new_fired
                settled |= new_settled
        return fired, settled

    def _act(
        self, chosen: list[Slot], fired: set[int], settled: set[int], slots: list[Slot], ended: Tensor | None
    ) -> None:
        due: dict[Action, list[Slot]] = {}
        for slot in chosen:
            action = self.method.refresh.due(slot.decoded, slot.since_mask, slot.id in fired)
            if action is None and slot.id in settled:
                action = Action.SETTLE
            if action is not None and not slot.finished:
                due.setdefault(action, []).append(slot)
        if not due:
            return
        # a detector that fired has looked already
        if ended is not None and any(slot.id not in fired for group in due.values() for slot in group):
            over = {slot.id for slot, is_over in zip(slots, ended.tolist(), strict=True) if is_over}
            due = {action: [s for s in group if s.id not in over] for action, group in due.items()}
        began = time.perf_counter()
        for action, group in due.items():
            if group:
                self._refresh(action, group, fired)
        self.seconds["refreshing"] += time.perf_counter() - began

    def _refresh(self, action: Action, slots: list[Slot], fired: set[int]) -> None:
        changed: list[Tensor | None] = [None] * len(slots)
        if action in (Action.REPLAY, Action.SETTLE):
            changed = list(self.renewal.replay(slots))
        else:
            self.renewal.drop(slots)
        for slot, new in zip(slots, changed, strict=True):
            slot.since_mask = 0
            event = Event(action.value, slot.sequence, slot.position, slot.decoded)
            if slot.id in fired and slot.similarities:
                _, similarity, threshold = slot.similarities[-1]
                event = replace(event, similarity=similarity, threshold=threshold)
            if action is Action.REPLAY and self.method.refresh.detects:
                slot.drift.restart(slot.recent)
                slot.settling = self.method.refresh.settle_tokens > slot.drift.reference_tokens
            elif action is Action.RELEARN:
                self.renewal.forget([slot])
                slot.state, slot.traced, slot.least = State.LEARNING, 0, 1
                slot.dense_left = self.method.refresh.dense_tokens
                slot.drift = self.method.detector.build()
            elif action is Action.RELEASE:
                slot.state = State.RELEASED
            self._announce(slot, event, new)
