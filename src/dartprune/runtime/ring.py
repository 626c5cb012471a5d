"""The last FFN inputs of each slot, so that a refresh can replay them (no dense token needed)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dartprune.runtime.device_values import DeviceValues
from dartprune.runtime.slot_tensors import SlotTensors

EIGHT = torch.float8_e4m3fn  # three bits of mantissa: masks made from it differ by a neuron in hundreds
LARGEST = torch.finfo(EIGHT).max


def has_kernel(device: torch.device) -> bool:
    """Whether rows are stored by a kernel there."""
    return device.type == "cpu" and importlib.util.find_spec("numba") is not None


class Rings(SlotTensors):
    """FFN inputs of the last R tokens of layers that are alike, in 8-bit floats with one scale for each token.

    codes: uint8 [slots, layers, R + 1, H], the bits of float8_e4m3fn.  scales: float32 [slots, layers, R + 1].  The
    extra row takes what must not be kept.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layers: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        self.dtype = dtype
        self.layers = [LayerRing(self, number) for number in range(layers)]
        self._on_device = DeviceValues()
        self._has_kernel = has_kernel(device)
        self._kept: list[tuple[list[int], Tensor, Tensor, Tensor]] = []
        # as bytes: few operations know 8-bit floats
        self._allocate("codes", (layers, tokens + 1, hidden), torch.uint8)
        self._allocate("scales", (layers, tokens + 1), torch.float32)

    def keep(self, x: Tensor, slots: Tensor, places: Tensor, layers: list[int] | None = None) -> None:
        """Put rows of layers (all of them by default) aside until `settle`.

        That must come before slots and places change, and the rows must stay as they are.

        Args:
            x: the rows, [L, M, H].
            slots: int64 [M], where they go.
            places: int64 [M], of the slots' rings.
            layers: their numbers.
        """
        self._kept.append((list(range(len(self.layers))) if layers is None else layers, x, slots, places))

    def prepare(self) -> None:
        """Compile the kernel for these rings (kept on disk), so that no token waits for it."""
        if not self._has_kernel:
            return
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        x = torch.zeros(0, 0, self.codes.shape[-1], dtype=self.dtype, device=self.device)
        self._store_rows(x, none, none, none)

    def forget(self) -> None:
        """Drop what is put aside."""
        self._kept.clear()

    def settle(self) -> None:
        """Store what is put aside, all layers at once where they can be."""
        alike: dict[Any, tuple[list[int], list[Tensor]]] = {}
        for layers, x, slots, places in self._kept:
            numbers, parts = alike.setdefault((x.shape[1:], x.dtype, slots, places), ([], []))
            numbers += layers
            parts.append(x)
        for (_, _, slots, places), (numbers, parts) in alike.items():
            self._store_rows(torch.cat(parts), self._on_device(numbers, self.device), slots, places)
        self.forget()

    def _store_rows(self, x: Tensor, layers: Tensor, slots: Tensor, places: Tensor) -> None:
        """`store` of rows [L, M, H], by one kernel where there is one for them."""
        from dartprune.ffn.cpu.arrays import WORDS, words

        if not self._has_kernel or x.dtype not in WORDS:
            self.store(x, layers[:, None], slots, places)
            return
        from dartprune.ffn.cpu.ring_kernels import store_rows

        room = self.codes.numpy(), self.scales.numpy()
        store_rows(words("inputs", x.contiguous()), layers.numpy(), slots.numpy(), places.numpy(), *room)

    def store(self, x: Tensor, layers: Tensor | int, slots: Tensor, places: Tensor) -> None:
        """Round inputs [..., H] to the layers, slots and places that are named, whose shapes together are [...]."""
        wide = x.float()
        scale = (wide.abs().amax(-1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        self.codes[slots, layers, places] = (wide / scale[..., None]).to(EIGHT).view(torch.uint8)
        self.scales[slots, layers, places] = scale


class LayerRing:
    """What is kept of one layer: `rings.codes[:, number]`."""

    def __init__(self, rings: Rings, number: int) -> None:
        self.rings, self.number = rings, number

    def write(self, x: Tensor, rows: Tensor, slots: Tensor, places: Tensor) -> None:
        """Store rows of x ([N, H]): row rows[m] goes to place places[m] of slot slots[m] (int64 [M] each)."""
        self.rings.store(x.index_select(0, rows), self.number, slots, places)

    def keep(self, x: Tensor, slots: Tensor, places: Tensor) -> None:
        """The same of rows [M, H] of its own, put aside: see `Rings.keep`."""
        self.rings.keep(x[None], slots, places, [self.number])

    def read(self, slots: Tensor, places: Tensor) -> Tensor:
        """Stored inputs [n, m, H] of slots [n] at places [n, m], in the dtype of the inputs."""
        at = slots[:, None], self.number, places
        wide = self.rings.codes[at].view(EIGHT).float() * self.rings.scales[at][..., None]
        return wide.to(self.rings.dtype)
