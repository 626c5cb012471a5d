"""The last FFN inputs of each slot, so that a refresh can replay them (no dense token needed)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        self._kept: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def write(self, x: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
        """Store rows of x ([N, H]): row rows[m] goes to place places[m] of slot slots[m] (int64 [M] each)."""
        self._store(*_rounded(x.index_select(0, rows)), (slots, places))

    def keep(self, x: Tensor, slots: Tensor, places: Tensor) -> None:
        """The same of rows [M, H] of its own, put aside until `settle`; that must come before slots and places change.

        The rows must stay as they are.
        """
        self._kept = x, (slots, places)

    def forget(self) -> None:
        """Drop what is put aside."""
        self._kept = None

    def _store(self, codes: Tensor, scales: Tensor, where: tuple[Tensor, Tensor]) -> None:
        self.codes.index_put_(where, codes)
        self.scales.index_put_(where, scales)

    def read(self, slots: Tensor, places: Tensor) -> Tensor:
        """Stored inputs [n, m, H] of slots [n] at places [n, m], in the dtype of the inputs."""
        at = (slots[:, None], places)
        wide = self.codes[at].view(EIGHT).float() * self.scales[at][..., None]
        return wide.to(self.dtype)


def settle(rings: Iterable[LayerRing]) -> None:
    """Store what rings have put aside. Inputs of one shape are rounded together: few operations for all layers."""
    alike: dict[Any, list[LayerRing]] = {}
    for ring in rings:
        if ring._kept is not None:
            x = ring._kept[0]
            alike.setdefault((x.shape, x.dtype, x.device), []).append(ring)
    for group in alike.values():
        kept = [ring._kept for ring in group if ring._kept is not None]
        codes, scales = _rounded(torch.stack([x for x, _ in kept]))
        for ring, (_, where), part, scale in zip(group, kept, codes.unbind(0), scales.unbind(0), strict=True):
            ring._store(part, scale, where)
            ring.forget()


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [..., H] as bits of 8-bit floats and their scales [...]."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale[..., None]).to(EIGHT).view(torch.uint8), scale
