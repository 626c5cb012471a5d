"""What decoded tokens leave behind: they are counted, and the detectors hear of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.runtime.device_values import DeviceValues
from dartprune.runtime.reasons import CAUSES, why_dense
from dartprune.runtime.slot_tensors import Counters
from dartprune.runtime.slots import Slot, State
from dartprune.runtime.windows import Detectors


class Tokens:
    """Counts the decoded tokens of each sequence on the device, and feeds its detector."""

    def __init__(self, method: Method, counters: Counters, detectors: Detectors) -> None:
        self.method = method
        self.counters = counters
        self.detectors = detectors
        self.seconds = 0.0  # spent detecting
        self._on_device = DeviceValues()

    def decoded(
        self,
        slots: Sequence[Slot],
        pruned: Sequence[bool],
        tokens: int,
        attention: Tensor | None,
        ended: Tensor | None,
        spent: Tensor | None,
    ) -> tuple[set[int], set[int]]:
        """Some tokens of each sequence are known to stay.

        Args:
            slots: the sequences.
            pruned: whose masks were in force.
            tokens: of each sequence.
            attention: the last layer's attention outputs, [B, tokens, H]; None where pruning was paused.
            ended: bool [B], lines that are over; None if not known.
            spent: float32 [B, tokens], the share of the FFN's weights that each token chose; None without a selector.

        Returns:
            ids of the sequences whose detector fired, and of those whose new reference is now settled.
        """
        ids = self._on_device([slot.id for slot in slots], self.counters.device)
        self._count(ids, pruned, tokens, ended, spent)
        if self.method.prunes and not all(pruned):
            self._count_causes(slots, ids, pruned, tokens, ended, paused=attention is None)
        began = time.perf_counter()
        fired, settled = self._detect(slots, pruned, ids, tokens, attention, ended)
        self.seconds += time.perf_counter() - began
        for slot, is_pruned in zip(slots, pruned, strict=True):
            slot.position += tokens
            if is_pruned:
                slot.masks.age += tokens
            elif slot.state is State.LEARNING and attention is not None:
                slot.traced += tokens
                slot.dense_left = max(0, slot.dense_left - tokens)
            if attention is not None:
                slot.ring.advance(tokens, self.method.refresh.replay_tokens)
        return fired, settled

    def forget_padding(self, slots: Sequence[Slot]) -> None:
        """More text follows: what these sequences were fed after their ends did not happen (waits for the device)."""
        older = [slot for slot in slots if slot.decoded > slot.inherited]
        if not older:
            return
        ids = [slot.id for slot in older]
        counted = (self.counters.dense[ids] + self.counters.pruned[ids]).tolist()
        for slot, count in zip(older, counted, strict=True):
            real = slot.inherited + int(count)
            slot.traced = slot.traced_within(real)
            slot.events = slot.events_within(real)
            slot.detection.similarities = [item for item in slot.detection.similarities if item[0] <= real]
            slot.masks.born = min(slot.masks.born, real)
            slot.decoded = real

    def uncount(self, slot: Slot, pruned: int, dense: int) -> None:
        """Decoded tokens that were taken back did not happen; each had saved what tokens of this sequence save."""
        counters = self.counters
        before = counters.pruned[slot.id].clamp_min(1)
        counters.saved[slot.id] *= 1 - pruned / before
        counters.pruned[slot.id] -= pruned
        counters.dense[slot.id] -= dense
        if self.method.prunes:
            counters.causes[slot.id, why_dense(slot, self.method, paused=False)] -= dense

    def _count(
        self, ids: Tensor, pruned: Sequence[bool], tokens: int, ended: Tensor | None, spent: Tensor | None
    ) -> None:
        device = self.counters.device
        alive = torch.ones(len(pruned), dtype=torch.float32, device=device)
        if ended is not None:
            alive = (~ended).to(alive)
        mask = self._on_device(pruned, device)
        self.counters.pruned.index_add_(0, ids, (alive * mask * tokens).long())
        self.counters.dense.index_add_(0, ids, (alive * ~mask * tokens).long())
        left_out = tokens * self.counters.share.index_select(0, ids)
        if spent is not None:
            left_out = left_out - spent.sum(1)
        self.counters.saved.index_add_(0, ids, alive * mask * left_out)

    def _count_causes(
        self,
        slots: Sequence[Slot],
        ids: Tensor,
        pruned: Sequence[bool],
        tokens: int,
        ended: Tensor | None,
        *,
        paused: bool,
    ) -> None:
        """What keeps the tokens of sequences that are not pruned dense."""
        numbers = [
            len(CAUSES) if is_pruned else why_dense(slot, self.method, paused=paused)
            for slot, is_pruned in zip(slots, pruned, strict=True)
        ]
        counts = torch.full_like(ids, tokens) if ended is None else tokens * (~ended).to(ids)
        causes = self._on_device(numbers, ids.device)
        self.counters.causes.index_put_((ids, causes), counts, accumulate=True)

    def _detect(
        self,
        slots: Sequence[Slot],
        pruned: Sequence[bool],
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
                    slot.detection.drift.reference(attention[line, t : t + 1])
            if watched:
                every = len(watched) == len(slots)
                lines = self._on_device(watched, attention.device)
                new_fired, new_settled = self.detectors.feed(
                    [slots[line] for line in watched],
                    ids.to(attention.device) if every else ids.to(attention.device)[lines],
                    attention[:, t] if every else attention[lines, t],
                    ended if every or ended is None else ended[lines.to(ended.device)],
                )
                fired |= new_fired
                settled |= new_settled
        return fired, settled
