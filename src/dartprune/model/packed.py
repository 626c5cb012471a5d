"""What the modules of a quantised model have in common, and what tells whether the kernels can serve them."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.errors import UserError

BLOCK = 1 << 22  # weights that are packed or unpacked at a time


class Packed(nn.Module, ABC):
    """Base: weights that are computed on the CPU only, kept out of state dicts.

    role: which of the weights that its tensors stand for are its own.  weights: how many these are.
    """

    role: str = "up"
    weights: int

    def keep(self, **tensors: Tensor) -> None:
        """Register packed tensors."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `packed_file` must know beside the tensors, in plain values."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(torch.empty(0, dtype=torch.uint8, device="cpu")).device.type != "cpu":
            raise UserError("a quantised model computes on the CPU: move the original elsewhere and do not quantise it")
        moved: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


def has_kernels() -> bool:
    """Whether the row kernels can be used: they need Numba."""
    return importlib.util.find_spec("numba") is not None


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient is to pass to an input: neither our kernels nor torch's have one."""
    return torch.is_grad_enabled() and x.requires_grad


def scaled(vectors: Tensor, factor: float) -> Tensor:
    """Vectors of tokens, multiplied with a number."""
    return vectors if factor == 1.0 else vectors * torch.tensor(factor, dtype=vectors.dtype, device="cpu")
