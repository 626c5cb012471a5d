"""Which neurons are kept: chosen by their scores, held as index lists per layer and slot (DART section 3.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dartprune.runtime.slot_tensors import SlotTensors


def keep_top(scores: Tensor, k: int) -> Tensor:
    """The k neurons with the highest scores, ties to the lower neuron.

    Args:
        scores: [..., I].
        k: how many, 0 to I.

    Returns:
        int32 [..., k], ascending.

    Raises:
        ValueError: k outside 0 to I.
    """
    neurons = scores.shape[-1]
    if not 0 <= k <= neurons:
        raise ValueError(f"cannot keep {k} of {neurons} neurons")
    if scores.device.type == "cpu" and 0 < k < neurons:
        # no sort: the k-th score, all above it, and the first of those that equal it; four times faster at I = 14336
        cut = torch.topk(scores, k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above, equal = scores > cut, scores == cut
        taken = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        kept = taken.nonzero()[:, -1].to(torch.int32)
        shape = (*scores.shape[:-1], k)
        if kept.numel() == math.prod(shape):  # not so where a score is NaN: the sort has an order for that too
            return kept.view(shape)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.to(torch.int32)


def keep_above_mean(scores: Tensor) -> Tensor:
    """The neurons whose score [I] is at least the mean, int32 ascending (waits for the device)."""
    # the mean of equal scores may be rounded above all of them, and none would be kept
    chosen: Any = (scores >= torch.minimum(scores.mean(), scores.max())).nonzero()
    kept: Tensor = chosen[:, 0].to(torch.int32)
    return kept


def choose(scores: Tensor, count: int, selection: str) -> Tensor:
    """The neurons that a mask keeps, int32 ascending: of scores [I] the highest `count`, or all above the mean."""
    return keep_above_mean(scores) if selection == "threshold" else keep_top(scores, count)


class LayerSelection(SlotTensors):
    """Kept neurons of one layer: index int32 [slots, W], count int32 [slots], written in place at fixed addresses.

    Entries past count are neuron 0.

    With `masks`, also a bool mask [slots, I] for backends that zero instead of gather. A slot without a selection has
    every neuron: count -1 and a mask of ones. With `compensation`, a vector [slots, H] that is added to the FFN's
    output. With `everything` a selection keeps all neurons: a token selector goes on from there.
    """

    index: Tensor
    count: Tensor
    mask: Tensor
    compensation: Tensor

    def __init__(
        self,
        neurons: int,
        width: int,
        device: torch.device,
        *,
        masks: bool,
        compensation: int | None = None,
        everything: bool = False,
    ) -> None:
        super().__init__(device)
        self.everything = everything
        self.neurons = neurons
        self.has_masks = masks
        self.has_compensation = compensation is not None
        self._allocate("index", (width,), torch.int32)
        self._allocate("count", (), torch.int32, fill=-1)
        if masks:
            self._allocate("mask", (neurons,), torch.bool, fill=1)
        if compensation is not None:
            self._allocate("compensation", (compensation,), torch.float32)

    def write(self, slot: int, kept: Tensor, former: int | None) -> Tensor:
        """Set the kept neurons of a slot.

        Args:
            slot: whose.
            kept: int32 [k], ascending.
            former: how many it kept before (in the list that is overwritten now), None if it never had a list.

        Returns:
            how many of `kept` were not kept before, a scalar on the device.
        """
        before = torch.full((self.neurons,), former is None, device=self.device)
        if former is not None:
            before[self.index[slot, :former].long()] = True
        k = kept.shape[0]
        self.index[slot, :k] = kept
        self.index[slot, k:] = 0
        self.count[slot] = k
        now = torch.zeros(self.neurons, dtype=torch.bool, device=self.device)
        now[kept.long()] = True
        if self.has_masks:
            self.mask[slot] = now
        return (now & ~before).sum()

    def write_all(self, slots: list[int]) -> None:
        """Let these slots keep everything, as a selection."""
        for slot in slots:
            self.count[slot] = self.neurons

    def open(self, slots: list[int]) -> None:
        """Every neuron again; the lists stay, to be compared with the next ones."""
        for slot in slots:
            self.count[slot] = -1
            if self.has_masks:
                self.mask[slot] = True
            if self.has_compensation:
                self.compensation[slot] = 0.0

    def rows_mask(self, slots: Tensor) -> Tensor:
        """The masks of these slots (int64 [B]), bool [B, I]; a slot without a selection has ones."""
        if self.has_masks:
            return self.mask.index_select(0, slots)
        index = self.index.index_select(0, slots).long()
        count = self.count.index_select(0, slots)[:, None]
        valid = torch.arange(index.shape[1], device=index.device)[None] < count
        hits = torch.zeros(len(slots), self.neurons, dtype=torch.int32, device=index.device)
        hits.scatter_add_(1, index, valid.to(torch.int32))
        return (hits > 0) | (count < 0)

    def kept(self, slot: int, count: int) -> Tensor:
        """The kept neurons of a slot, int32 [count]."""
        if self.everything:
            return torch.arange(self.neurons, dtype=torch.int32, device=self.device)
        return self.index[slot, :count]
