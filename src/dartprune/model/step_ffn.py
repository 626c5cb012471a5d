"""The FFN of a dense decode step over rows of 4 or 8 bits: one pass over whole neurons, not one for each projection."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.ffn.quantised import QuantisedRows
from dartprune.model.layer import Layer
from dartprune.model.packed_rows import packed_rows
from dartprune.model.step_parts import OwnModule, StepMode, untouched


@cache
def _list_of_all(neurons: int) -> Tensor:
    """The numbers of all neurons, int32 [1, I]: one for all layers."""
    return torch.arange(neurons, dtype=torch.int32, device="cpu")[None]


class OwnFFN(OwnModule):
    """The forward of one FFN module in rows: few tokens by the kernel that masks use, over all neurons."""

    def __init__(self, layer: Layer, mode: StepMode) -> None:
        super().__init__(layer.entry, mode)
        self._layer = layer
        self._called = [part for part in layer.skipped().values() if isinstance(part, nn.Module)]
        self._all = _list_of_all(layer.neurons)
        self._count = torch.tensor([layer.neurons], dtype=torch.int32, device="cpu")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The FFN of x [..., H]."""
        rows = packed_rows(self._layer) if self.in_use and self.mode.takes(x) else None
        # where somebody listens to one of its modules, all are called
        if rows is None or args or kwargs or not all(map(untouched, self._called)):
            return self.before(x, *args, **kwargs)
        return self._over(x, rows, self._count)

    def prepare(self) -> None:
        """Compile the kernel, so that no token waits for it."""
        rows = packed_rows(self._layer)
        assert rows is not None
        self._over(torch.zeros(1, rows.hidden, dtype=rows.dtype, device="cpu"), rows, torch.ones_like(self._count))

    def _over(self, x: Tensor, rows: QuantisedRows, count: Tensor) -> Tensor:
        """The FFN of x [..., H] over the first neurons, so many."""
        from dartprune.ffn.cpu.quantised import pruned_ffn

        flat = x.reshape(-1, x.shape[-1])
        slots = torch.zeros(flat.shape[0], dtype=torch.int64, device="cpu")
        return pruned_ffn(flat, rows, self._all, count, slots).view(x.shape)
