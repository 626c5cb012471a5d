"""Token selectors at work in one layer: which neurons each row of a forward uses, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dartprune.ffn.token_ops import chosen_mask, chosen_rows
from dartprune.selection import LayerSelection
from dartprune.slots import SlotTensors


class LayerToken(SlotTensors, ABC):
    """One layer's selector: `wanted` int32 [slots] neurons for each token of a slot.

    row_share: share of the layer's weights that one chosen neuron costs.  taken: neurons that each row of the last
    forward used, int32 [N]; they wait here until it is known which of the rows count.
    """

    wanted: Tensor

    def __init__(self, device: torch.device, row_share: float) -> None:
        super().__init__(device)
        self.row_share = row_share
        self.taken: Tensor | None = None
        self._allocate("wanted", (), torch.int32)

    def fixed_share(self, candidates: int) -> float:
        """Share of the layer's weights that a token reads whatever it chooses."""
        return 0.0

    def take(self) -> Tensor | None:
        """What the rows of the last forward used, once; None if the selector was not asked."""
        taken, self.taken = self.taken, None
        return taken

    @abstractmethod
    def mask(self, a: Tensor, x: Tensor, selection: LayerSelection, slots: Tensor) -> Tensor:
        """Which neurons each row uses, for an FFN that is computed whole.

        Args:
            a: input of the down projection, [N, I].
            x: input of the FFN, [N, H].
            selection: the candidates of each slot.
            slots: int64 [N], the slot of each row.

        Returns:
            bool [N, I]; all ones where a slot has no selection.
        """


class ExactLayer(LayerToken):
    """The highest `|a_i| * |W_down[:, i]|` of each row, exactly."""

    def __init__(self, device: torch.device, row_share: float, importance: Tensor) -> None:
        """Set up; `importance` float32 [I] is the norm of each down row."""
        super().__init__(device, row_share)
        self.importance = importance

    def mask(self, a: Tensor, x: Tensor, selection: LayerSelection, slots: Tensor) -> Tensor:
        """See `LayerToken.mask`."""
        return self._pick(a.float().abs() * self.importance, selection, slots)

    def _pick(self, scores: Tensor, selection: LayerSelection, slots: Tensor) -> Tensor:
        neurons = scores.shape[1]
        index, self.taken, _ = chosen_rows(scores, self.wanted.index_select(0, slots), neurons)
        dense = selection.count.index_select(0, slots) < 0
        return chosen_mask(index, self.taken, neurons) | dense[:, None]
