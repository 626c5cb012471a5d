"""Adds up what the neurons chosen for each token cost, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.token.layer import LayerToken


class Tally:
    """The chosen neurons of all layers, as shares of the FFN's weights."""

    def __init__(self, tokens: Sequence[LayerToken], weights: Sequence[int], device: torch.device) -> None:
        """Set up.

        Args:
            tokens: the selector of every layer.
            weights: FFN weights of every layer.
            device: where the counters are.
        """
        self.tokens = list(tokens)
        whole = sum(weights)
        shares = [token.row_share * size / whole for token, size in zip(tokens, weights, strict=True)]
        self._shares = torch.tensor(shares, dtype=torch.float32, device=device)

    def spent(self, lines: int) -> Tensor | None:
        """What the rows of the last forward used, float32 [lines, T]; None where no selector chose."""
        taken = [token.take() for token in self.tokens]
        if any(part is None for part in taken):
            return None
        counts = torch.stack([part.to(self._shares.device) for part in taken if part is not None])
        return (self._shares @ counts.float()).view(lines, -1)
