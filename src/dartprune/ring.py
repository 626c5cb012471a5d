"""The last FFN inputs of each slot, so that a refresh can replay them (no dense token needed)."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.slots import SlotTensors


class LayerRing(SlotTensors):
    """FFN inputs of the last R tokens of one layer, [slots, R + 1, H]; the extra row takes what must not be kept."""

    inputs: Tensor

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        self.length = tokens
        self._allocate("inputs", (tokens + 1, hidden), dtype)

    def write(self, x: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
        """Store rows of x ([N, H]): row rows[m] goes to place places[m] of slot slots[m] (int64 [M] each)."""
        self.inputs.index_put_((slots, places), x.index_select(0, rows).to(self.inputs.dtype))

    def read(self, slots: Tensor, places: Tensor) -> Tensor:
        """Stored inputs [n, m, H] of slots [n] at places [n, m]."""
        return self.inputs[slots[:, None], places]
