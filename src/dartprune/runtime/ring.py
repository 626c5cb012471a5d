"""The last FFN inputs of each slot, so that a refresh can replay them (no dense token needed)."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.runtime.slot_tensors import SlotTensors

EIGHT = torch.float8_e4m3fn  # three bits of mantissa: masks made from it differ by a neuron in hundreds
LARGEST = torch.finfo(EIGHT).max


class LayerRing(SlotTensors):
    """FFN inputs of the last R tokens of one layer, in 8-bit floats with one scale for each token.

    codes: uint8 [slots, R + 1, H], the bits of float8_e4m3fn.  scales: float32 [slots, R + 1].  The extra row takes
    what must not be kept.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        self.length = tokens
        self.dtype = dtype
        # as bytes: few operations know 8-bit floats
        self._allocate("codes", (tokens + 1, hidden), torch.uint8)
        self._allocate("scales", (tokens + 1,), torch.float32)

    def write(self, x: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
        """Store rows of x ([N, H]): row rows[m] goes to place places[m] of slot slots[m] (int64 [M] each)."""
        chosen = x.index_select(0, rows).float()
        scale = (chosen.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        self.codes.index_put_((slots, places), (chosen / scale[:, None]).to(EIGHT).view(torch.uint8))
        self.scales.index_put_((slots, places), scale)

    def read(self, slots: Tensor, places: Tensor) -> Tensor:
        """Stored inputs [n, m, H] of slots [n] at places [n, m], in the dtype of the inputs."""
        at = (slots[:, None], places)
        wide = self.codes[at].view(EIGHT).float() * self.scales[at][..., None]
        return wide.to(self.dtype)
