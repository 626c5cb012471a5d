"""Adds up what the neurons chosen for each token cost, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.runtime.selectors.layer_selector import LayerSelector


class Spending:
    """The chosen neurons of all layers: as shares of the FFN's weights, and as bytes that the backend read."""

    def __init__(self, selectors: Sequence[LayerSelector], device: torch.device) -> None:
        """Set up for the selectors of all layers; `device` is where the counters are."""
        self.selectors = list(selectors)
        whole = sum(selector.layer.weights for selector in selectors)
        shares = [selector.row_share * selector.layer.weights / whole for selector in selectors]
        self._shares = torch.tensor(shares, dtype=torch.float32, device=device)
        self._bytes = torch.tensor(
            [selector.chosen_bytes for selector in selectors], dtype=torch.float64, device=device
        )
        self._read = torch.zeros((), dtype=torch.float64, device=device)

    def spent(self, lines: int, tokens: int, *, gathered: bool) -> Tensor | None:
        """What the rows of the last forward used, float32 [lines, tokens]; None where no selector chose."""
        parts = [selector.take(lines * tokens, gathered=gathered) for selector in self.selectors]
        device = self._shares.device
        unions = [union.to(device) for _, union in parts if union is not None]
        if len(unions) == len(parts):
            self._read += self._bytes @ torch.stack(unions).double()
        taken = [count.to(device) for count, _ in parts if count is not None]
        if len(taken) < len(parts):
            return None
        return (self._shares[:, None] * torch.stack(taken).float()).sum(0).view(lines, tokens)

    @property
    def held(self) -> int:
        """Bytes held for the model: sketches and what neurons are weighed with."""
        return sum(selector.held for selector in self.selectors)

    @property
    def bytes_read(self) -> float:
        """Bytes of chosen rows that the backend read so far (waits for the device)."""
        return float(self._read)
