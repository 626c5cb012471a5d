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
        self._told: tuple[Tensor, Tensor] | None = None

    def tell(self, counts: Tensor, unions: Tensor) -> None:
        """What the rows of a forward used, int32 [layers, N], and were read for, int32 [layers]: all layers at once."""
        self._told = counts, unions

    def forget(self) -> None:
        """That forward failed."""
        self._told = None

    def spent(self, lines: int, tokens: int, *, gathered: bool) -> Tensor | None:
        """What the rows of the last forward used, float32 [lines, tokens]; None where no selector chose."""
        counts, unions = self._told or self._taken(lines * tokens, gathered=gathered)
        self.forget()
        if unions is not None:
            self._read += self._bytes @ unions.double()
        return None if counts is None else (self._shares[:, None] * counts.float()).sum(0).view(lines, tokens)

    def _taken(self, rows: int, *, gathered: bool) -> tuple[Tensor | None, Tensor | None]:
        counts, unions = zip(*(selector.take(rows, gathered=gathered) for selector in self.selectors), strict=True)
        return self._stacked(counts), self._stacked(unions)

    def _stacked(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        found = [part.to(self._shares.device) for part in parts if part is not None]
        return torch.stack(found) if len(found) == len(parts) else None

    @property
    def held(self) -> int:
        """Bytes held for the model: sketches and what neurons are weighed with."""
        return sum(selector.held for selector in self.selectors)

    @property
    def bytes_read(self) -> float:
        """Bytes of chosen rows that the backend read so far (waits for the device)."""
        return float(self._read)
