"""Tensors whose first axis is the slot: one row for each live sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class SlotTensors:
    """Tensors with one row per slot, at fixed addresses until the number of slots grows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._fills: dict[str, float] = {}

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0) -> None:
        self._fills[name] = fill
        # a tensor born in inference mode could not be written outside of it
        with torch.inference_mode(False):
            setattr(self, name, torch.full((0, *shape), fill, dtype=dtype, device=self.device))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, each [slots, ...]."""
        return {name: getattr(self, name) for name in self._fills}

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots; what is there stays."""
        for name, tensor in self.tensors().items():
            if tensor.shape[0] < capacity:
                with torch.inference_mode(False):
                    larger = torch.full(
                        (capacity, *tensor.shape[1:]),
                        self._fills[name],
                        dtype=tensor.dtype,
                        device=tensor.device,
                    )
                    larger[: tensor.shape[0]] = tensor
                if larger.is_cuda:
                    # a compiled step's CUDA graph then writes here, instead of refusing an input that it changes
                    torch._dynamo.mark_static_address(larger, guard=False)
                setattr(self, name, larger)

    def clear(self, slots: list[int]) -> None:
        """Set the rows of these slots to their first value."""
        for name, tensor in self.tensors().items():
            tensor[slots] = self._fills[name]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` to rows `target` (int64 [n] each), as if all at once."""
        for tensor in self.tensors().values():
            device = tensor.device
            tensor.index_copy_(0, target.to(device), tensor.index_select(0, source.to(device)))

    def fork(self, slots: list[int]) -> None:
        """These slots were copied from others and go their own way from here."""

    def bytes_per_slot(self) -> int:
        """Bytes that one slot holds here."""
        return sum(t[0].nbytes if t.shape[0] else t.new_empty(t.shape[1:]).nbytes for t in self.tensors().values())


class Counters(SlotTensors):
    """What must be counted on the device, because only the device knows which lines of a batch are finished."""

    dense: Tensor
    pruned: Tensor
    causes: Tensor
    saved: Tensor
    share: Tensor

    def __init__(self, device: torch.device, causes: int) -> None:
        super().__init__(device)
        self._allocate("dense", (), torch.int64)
        # dense tokens by what kept them dense; one column more takes what is not dense
        self._allocate("causes", (causes + 1,), torch.int64)
        self._allocate("pruned", (), torch.int64)
        self._allocate("saved", (), torch.float32)  # sum over pruned tokens of the share of FFN weights left out
        self._allocate("share", (), torch.float32)  # that share under the masks in force

    def fork(self, slots: list[int]) -> None:
        """What their source decoded is counted there."""
        for counter in (self.dense, self.causes, self.pruned, self.saved):
            counter[slots] = 0
