"""Feeds the detectors of all pruned sequences, with one transfer from the device per window (DART section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.runtime.device_values import DeviceValues
from dartprune.runtime.slot_tensors import SlotTensors
from dartprune.runtime.slots import Slot


class Windows(SlotTensors):
    """The attention outputs of the window under way, float32 [slots, window, H]."""

    vectors: Tensor

    def __init__(self, window: int, hidden: int, device: torch.device) -> None:
        super().__init__(device)
        self.length = window
        self._allocate("vectors", (window, hidden), torch.float32)


class Detectors:
    """Collects decoded tokens into windows and tells which sequences have drifted."""

    def __init__(self, windows: Windows, settle: int, keep_recent: int) -> None:
        """Set up; `settle` tokens make a new reference whole, `keep_recent` window means are kept for a restart."""
        self.windows = windows
        self.settle = settle
        self.keep_recent = keep_recent
        self._once = DeviceValues()

    def feed(
        self, slots: Sequence[Slot], ids: Tensor, vectors: Tensor, ended: Tensor | None
    ) -> tuple[set[int], set[int]]:
        """Take one decoded token of each sequence.

        Args:
            slots: the pruned sequences.
            ids: their ids on the device, int64 [B].
            vectors: their attention outputs, [B, H].
            ended: which of them are over, bool [B], or None.

        Returns:
            ids of the sequences whose detector fired, and of those whose new reference is now settled.
        """
        fills = {slot.detection.fill for slot in slots}
        for fill in fills:
            if len(fills) == 1:
                rows, part = ids, vectors
            else:
                chosen = self._once([i for i, slot in enumerate(slots) if slot.detection.fill == fill], ids.device)
                rows, part = ids.index_select(0, chosen), vectors.index_select(0, chosen)
            self.windows.vectors.select(1, fill).index_copy_(0, rows, part.float())
        due: list[tuple[int, Slot]] = []
        for line, slot in enumerate(slots):
            slot.detection.fill += 1
            if slot.detection.fill == self.windows.length:
                slot.detection.fill = 0
                due.append((line, slot))
        return self._judge(due, ended) if due else (set(), set())

    def _judge(self, due: list[tuple[int, Slot]], ended: Tensor | None) -> tuple[set[int], set[int]]:
        means = {slot.id: self.windows.vectors[slot.id].mean(0) for _, slot in due}
        settled: set[int] = set()
        compared: list[tuple[int, Slot]] = []
        for line, slot in due:
            slot.detection.recent = (
                [*slot.detection.recent, means[slot.id]][-self.keep_recent :] if self.keep_recent else []
            )
            if slot.detection.settling or not slot.detection.drift.ready:
                slot.detection.drift.absorb(means[slot.id])
                if slot.detection.settling and slot.detection.drift.reference_tokens >= self.settle:
                    slot.detection.settling = False
                    settled.add(slot.id)
            else:
                compared.append((line, slot))
        if not compared:
            return set(), settled
        figures = torch.stack([slot.detection.drift.compare(means[slot.id]) for _, slot in compared])
        over = figures.new_zeros(len(compared))
        if ended is not None:
            over = ended.index_select(0, self._once([line for line, _ in compared], ended.device)).to(figures)
        fired: set[int] = set()
        # the one transfer of this window, for all sequences together
        for (_, slot), (cosine, mu, sigma, is_over) in zip(
            compared, torch.cat((figures, over[:, None]), dim=1).tolist(), strict=True
        ):
            if is_over:
                slot.finished = True
                continue
            threshold = slot.detection.drift.similarity_threshold(mu, sigma)
            slot.detection.similarities.append((slot.decoded, cosine, threshold))
            if slot.detection.drift.decide(cosine, mu, sigma):
                fired.add(slot.id)
        return fired, settled
